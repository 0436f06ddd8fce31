/* Antialiased resizing of uint8 pixels in the arithmetic of torch's interpolate(antialias=True) on uint8 tensors:
   16-bit weights, first across, then down, rounded to 8 bits after each. */
#ifndef ORCHESTRATOR_RESIZE_H
#define ORCHESTRATOR_RESIZE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* For each output the first input, and weights for `count` inputs from there on; `count` is even. */
typedef struct {
    int count, precision, room;
    int *first;
    int16_t *weights; /* side x count */
    double *exact;
} Taps;

static double filter_of(double x, int cubic) {
    x = fabs(x);
    if (!cubic) return x < 1 ? 1 - x : 0;
    const double a = -0.5; /* as Pillow and torch's antialiased bicubic */
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* Weights for `side` outputs over [from, to); inputs outside [low, high) do not count. `first` is relative to low. */
static void taps_build(Taps *taps, double from, double to, int low, int high, int side, int cubic) {
    double scale = (to - from) / side, squeeze = scale > 1 ? 1 / scale : 1;
    double support = (cubic ? 2.0 : 1.0) * (scale > 1 ? scale : 1);
    int count = ((int)ceil(support) * 2 + 1 + 1) & ~1;
    if (taps->room < (side + 3) * count || !taps->first) {
        taps->room = (side + 3) * count * 2;
        free(taps->first), free(taps->weights), free(taps->exact);
        taps->first = malloc((size_t)taps->room * sizeof *taps->first);
        taps->weights = malloc((size_t)taps->room * sizeof *taps->weights + 64);
        taps->exact = malloc((size_t)taps->room * sizeof *taps->exact);
    }
    double most = 0;
    int widest = 0;
    for (int i = 0; i < side; i++) {
        double centre = from + scale * (i + 0.5), total = 0;
        double begin = trunc(centre - support + 0.5), end = trunc(centre + support + 0.5);
        int first = begin > low ? (int)begin : low, last = end < high ? (int)end : high;
        double *weights = taps->exact + (size_t)i * (size_t)count;
        int n = last - first > count ? count : last - first;
        for (int j = 0; j < n; j++) total += weights[j] = filter_of((j + first - centre + 0.5) * squeeze, cubic);
        for (int j = 0; j < n; j++) {
            if (total != 0) weights[j] /= total;
            if (weights[j] > most) most = weights[j];
        }
        for (int j = n > 0 ? n : 0; j < count; j++) weights[j] = 0;
        widest = n > widest ? n : widest;
        taps->first[i] = first - low;
    }
    for (taps->precision = 0; taps->precision < 22; taps->precision++)
        if ((int)(0.5 + most * (1 << (taps->precision + 1))) >= 1 << 15) break;
    taps->count = (widest + 1) & ~1;
    for (int i = 0; i < side; i++)
        for (int j = 0; j < taps->count; j++) {
            double w = taps->exact[(size_t)i * (size_t)count + (size_t)j] * (1 << taps->precision);
            taps->weights[(size_t)i * (size_t)taps->count + (size_t)j] = (int16_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
    for (int i = side; i < side + 3; i++) taps->first[i] = taps->first[side - 1]; /* outputs of the last group of 4 */
    memset(taps->weights + (size_t)side * (size_t)taps->count, 0, 3 * (size_t)taps->count * sizeof *taps->weights);
}

/* Bytes of a row between the two passes, with room for whole groups of 4 outputs. */
static size_t narrow_stride(int side) { return ((size_t)side + 3) / 4 * 16; }

static uint8_t saturate(int value) { return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value; }

static void across_plain(const uint8_t *row, const Taps *taps, uint8_t *out, int side) {
    for (int i = 0; i < side; i++) {
        const int16_t *weights = taps->weights + (size_t)i * (size_t)taps->count;
        const uint8_t *from = row + (ptrdiff_t)taps->first[i] * 4;
        for (int c = 0; c < 3; c++) {
            int sum = 1 << (taps->precision - 1);
            for (int j = 0; j < taps->count; j++) sum += weights[j] * from[4 * j + c];
            out[4 * i + c] = saturate(sum >> taps->precision);
        }
        out[4 * i + 3] = 0;
    }
}

static void down_plain(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side, int flip) {
    size_t stride = narrow_stride(side), plane = (size_t)side * (size_t)side;
    for (int y = 0; y < side; y++) {
        const int16_t *weights = taps->weights + (size_t)y * (size_t)taps->count;
        const uint8_t *from = narrow + (size_t)taps->first[y] * stride;
        int used = taps->count;
        while (used > 1 && !weights[used - 1]) used--; /* a weight of nothing may stand for a row that is not there */
        for (int x = 0; x < side; x++)
            for (int c = 0; c < 3; c++) {
                int sum = 1 << (taps->precision - 1);
                for (int j = 0; j < used; j++) sum += weights[j] * from[(size_t)j * stride + 4 * (size_t)x + (size_t)c];
                out[(size_t)c * plane + (size_t)y * (size_t)side + (size_t)(flip ? side - 1 - x : x)] = saturate(sum >> taps->precision);
            }
    }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))

/* Sums of one output in two rows, one row in each half: 32 bits for each of 4 channels. */
AVX2 static inline __m256i across_sums(const uint8_t *row, const uint8_t *next, const int16_t *weights, int count, __m256i half) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i order_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    __m256i sum = half;
    int j = 0, w;
    for (; j + 4 <= count; j += 4) {
        __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(row + 4 * j))),
                                               _mm_loadu_si128((const __m128i *)(next + 4 * j)), 1);
        memcpy(&w, weights + j, 4);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(four, order), _mm256_set1_epi32(w)));
        memcpy(&w, weights + j + 2, 4);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(four, order_high), _mm256_set1_epi32(w)));
    }
    if (j < count) {
        memcpy(&w, weights + j, 4);
        __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(row + 4 * j))),
                                              _mm_loadl_epi64((const __m128i *)(next + 4 * j)), 1);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(two, order), _mm256_set1_epi32(w)));
    }
    return sum;
}

/* Two rows of `count` taps; inlined for the usual counts. Writes up to 3 outputs more than `side`. */
AVX2 static inline __attribute__((always_inline)) void across_rows(const uint8_t *row, const uint8_t *next, const Taps *taps, uint8_t *out,
                                                                   uint8_t *out_next, int side, int count) {
    const __m256i half = _mm256_set1_epi32(1 << (taps->precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(taps->precision);
    const int16_t *weights = taps->weights;
    for (int i = 0; i < side; i += 4, weights += 4 * count) {
        __m256i sum[4];
        for (int k = 0; k < 4; k++) {
            ptrdiff_t from = (ptrdiff_t)taps->first[i + k] * 4;
            sum[k] = _mm256_sra_epi32(across_sums(row + from, next + from, weights + k * count, count, half), shift);
        }
        __m256i four = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
        _mm_storeu_si128((__m128i *)(out + 4 * i), _mm256_castsi256_si128(four));
        _mm_storeu_si128((__m128i *)(out_next + 4 * i), _mm256_extracti128_si256(four, 1));
    }
}

AVX2 static void across_avx2(const uint8_t *row, const uint8_t *next, const Taps *taps, uint8_t *out, uint8_t *out_next, int side) {
    switch (taps->count) {
    case 2: across_rows(row, next, taps, out, out_next, side, 2); break;
    case 4: across_rows(row, next, taps, out, out_next, side, 4); break;
    case 6: across_rows(row, next, taps, out, out_next, side, 6); break;
    default: across_rows(row, next, taps, out, out_next, side, taps->count);
    }
}

/* 8 pixels of 4 channels from `taps` rows. */
AVX2 static inline __m256i down_8(const uint8_t *from, size_t stride, const int16_t *weights, int count, __m256i half, __m128i shift) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i s0 = half, s1 = half, s2 = half, s3 = half;
    for (int j = 0; j < count; j += 2) {
        int w;
        memcpy(&w, weights + j, 4);
        __m256i pair = _mm256_set1_epi32(w), a = _mm256_loadu_si256((const __m256i *)(from + (size_t)j * stride));
        __m256i b = w >> 16 ? _mm256_loadu_si256((const __m256i *)(from + (size_t)(j + 1) * stride)) : zero;
        __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
        s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
        s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
        s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
    }
    __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
    __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
    return _mm256_packus_epi16(low, high);
}

AVX2 static void down_avx2(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side, int flip) {
    size_t stride = narrow_stride(side), plane = (size_t)side * (size_t)side;
    const __m256i half = _mm256_set1_epi32(1 << (taps->precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(taps->precision);
    const __m256i planes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i mirrored = _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 8, 4, 0, 13, 9, 5, 1, 14, 10, 6, 2, 15, 11, 7, 3));
    for (int y = 0; y < side; y++) {
        const int16_t *weights = taps->weights + (size_t)y * (size_t)taps->count;
        const uint8_t *from = narrow + (size_t)taps->first[y] * stride;
        int used = taps->count;
        while (used > 2 && !weights[used - 1] && !weights[used - 2]) used -= 2;
        uint8_t *row = out + (size_t)y * (size_t)side;
        for (int x = 0; x < side; x += 8) {
            __m256i eight = down_8(from + 4 * (size_t)x, stride, weights, used, half, shift);
            __m256i split = _mm256_shuffle_epi8(eight, flip ? mirrored : planes); /* rrrrggggbbbb.... in each half */
            __m256i joined = _mm256_permutevar8x32_epi32(split, flip ? _mm256_setr_epi32(4, 0, 5, 1, 6, 2, 7, 3) : _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
            uint8_t rgb[32];
            _mm256_storeu_si256((__m256i *)rgb, joined);
            int n = side - x < 8 ? side - x : 8;
            uint8_t *at = row + (flip ? side - x - n : x);
            for (int c = 0; c < 3; c++) memcpy(at + (size_t)c * plane, rgb + 8 * c + (flip ? 8 - n : 0), (size_t)n);
        }
    }
}
#endif

static int has_avx2(void) {
#if defined(__x86_64__)
    static int known = -1;
    if (known < 0) known = __builtin_cpu_supports("avx2") != 0;
    return known;
#else
    return 0;
#endif
}

/* Filter `rows` rows of 4-byte pixels across; the row buffer's column 0 is column -shift of the taps' inputs. */
static void resize_across(const uint8_t *rows, ptrdiff_t stride, int count, int shift, const Taps *taps, uint8_t *out, int side) {
    rows += (ptrdiff_t)shift * 4;
    size_t to = narrow_stride(side);
    int i = 0;
#if defined(__x86_64__)
    if (has_avx2()) {
        for (; i < count; i += 2) { /* an odd last row is filtered twice, into the same place */
            int next = i + 1 < count ? i + 1 : i;
            across_avx2(rows + i * stride, rows + next * stride, taps, out + (size_t)i * to, out + (size_t)next * to, side);
        }
        return;
    }
#endif
    for (; i < count; i++) across_plain(rows + i * stride, taps, out + (size_t)i * to, side);
}

/* Filter rows of `narrow` down into three planes. */
static void resize_down(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side, int flip) {
#if defined(__x86_64__)
    if (has_avx2()) {
        down_avx2(narrow, taps, out, side, flip);
        return;
    }
#endif
    down_plain(narrow, taps, out, side, flip);
}

#endif
