/* Antialiased resizing of uint8 pixels in the arithmetic of torch's interpolate(antialias=True) on uint8 tensors:
   16-bit weights, first across, then down, rounded to 8 bits after each.

   Between the passes a row is three planes, so that the second pass works on runs of bytes and writes them as they are. */
#ifndef ORCHESTRATOR_RESIZE_H
#define ORCHESTRATOR_RESIZE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { GROUP = 8 };  /* outputs that are filtered across together; the taps have room for whole groups */
enum { CHUNK = 32 }; /* bytes that are filtered down together; a plane between the passes has room for whole chunks */

/* What one axis of an output shows: [from, to) of the inputs, of which those outside [low, high) do not count. */
typedef struct {
    double from, to;
    int low, high, mirrored;
} Span;

/* For each output the first input, counted from `low`, and weights for `count` inputs from there on; `count` is even. */
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

static void taps_room(Taps *taps, int needed) {
    if (taps->room >= needed && taps->first) return;
    taps->room = needed * 2;
    free(taps->first), free(taps->weights), free(taps->exact);
    taps->first = malloc((size_t)taps->room * sizeof *taps->first);
    taps->weights = malloc((size_t)taps->room * sizeof *taps->weights + 64);
    taps->exact = malloc((size_t)taps->room * sizeof *taps->exact);
}

/* Exact weights, `count` for each output; returns the greatest, and in *widest how many of an output there are at most. */
static double taps_weigh(Taps *taps, const Span *span, int side, int cubic, int count, int *widest) {
    double scale = (span->to - span->from) / side, squeeze = scale > 1 ? 1 / scale : 1, most = 0;
    double support = (cubic ? 2.0 : 1.0) * (scale > 1 ? scale : 1);
    *widest = 0;
    for (int i = 0; i < side; i++) {
        double centre = span->from + scale * (i + 0.5), total = 0;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        int at = span->mirrored ? side - 1 - i : i;
        first = first > span->low ? first : span->low;
        last = last < span->high ? last : span->high;
        double *weights = taps->exact + (size_t)at * (size_t)count;
        int n = last - first > count ? count : last - first;
        for (int j = 0; j < n; j++) total += weights[j] = filter_of((j + first - centre + 0.5) * squeeze, cubic);
        for (int j = 0; j < n; j++) {
            if (total != 0) weights[j] /= total;
            if (weights[j] > most) most = weights[j];
        }
        for (int j = n > 0 ? n : 0; j < count; j++) weights[j] = 0;
        *widest = n > *widest ? n : *widest;
        taps->first[at] = first - span->low;
    }
    return most;
}

/* Taps for `side` outputs. */
static void taps_build(Taps *taps, Span span, int side, int cubic) {
    double scale = (span.to - span.from) / side, support = (cubic ? 2.0 : 1.0) * (scale > 1 ? scale : 1);
    int count = ((int)ceil(support) * 2 + 1 + 1) & ~1, widest, end = (side + GROUP - 1) / GROUP * GROUP;
    taps_room(taps, end * count);
    double most = taps_weigh(taps, &span, side, cubic, count, &widest);
    for (taps->precision = 0; taps->precision < 22; taps->precision++)
        if ((int)(0.5 + most * (1 << (taps->precision + 1))) >= 1 << 15) break;
    int used = taps->count = (widest + 1) & ~1;
    for (int i = 0; i < side; i++)
        for (int j = 0; j < used; j++) {
            double w = taps->exact[i * count + j] * (1 << taps->precision);
            taps->weights[i * used + j] = (int16_t)(w < 0 ? w - 0.5 : w + 0.5);
        }
    for (int i = side; i < end; i++) taps->first[i] = taps->first[side - 1]; /* of the last group */
    memset(taps->weights + side * used, 0, (size_t)((end - side) * used) * sizeof *taps->weights);
}

/* Weights of an output but for the last ones of nothing, which may stand for rows that are not there; even. */
static int taps_used(const Taps *taps, int output) {
    const int16_t *weights = taps->weights + output * taps->count;
    int used = taps->count;
    while (used > 2 && !weights[used - 1] && !weights[used - 2]) used -= 2;
    return used;
}

/* Bytes of a plane in a row between the two passes. */
static size_t plane_stride(int side) { return ((size_t)side + CHUNK - 1) / CHUNK * CHUNK; }

/* Bytes of `rows` rows between the two passes; the last pair of weights may reach a row further. */
static size_t narrow_bytes(int rows, int side) { return ((size_t)rows + 1) * 3 * plane_stride(side); }

static uint8_t saturate(int value) { return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value; }

static void across_plain(const uint8_t *row, const Taps *taps, uint8_t *out, int side) {
    for (int i = 0; i < side; i++) {
        const int16_t *weights = taps->weights + i * taps->count;
        const uint8_t *from = row + (ptrdiff_t)taps->first[i] * 4;
        for (int c = 0; c < 3; c++) {
            int sum = 1 << (taps->precision - 1);
            for (int j = 0; j < taps->count; j++) sum += weights[j] * from[4 * j + c];
            out[(size_t)c * plane_stride(side) + (size_t)i] = saturate(sum >> taps->precision);
        }
    }
}

static void down_plain(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side) {
    size_t stride = 3 * plane_stride(side);
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < side; y++) {
            const int16_t *weights = taps->weights + y * taps->count;
            const uint8_t *from = narrow + (size_t)taps->first[y] * stride + (size_t)c * plane_stride(side);
            int used = taps_used(taps, y);
            for (int x = 0; x < side; x++) {
                int sum = 1 << (taps->precision - 1);
                for (int j = 0; j < used; j++) sum += weights[j] * from[(size_t)j * stride + (size_t)x];
                *out++ = saturate(sum >> taps->precision);
            }
        }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 static inline __attribute__((always_inline))

/* Two neighbouring weights, as many times as fit. */
AVX2_INLINE __m256i weight_pair(const int16_t *weights) {
    int two;
    memcpy(&two, weights, sizeof two);
    return _mm256_set1_epi32(two);
}

AVX2_INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

/* Sums of one output in two rows, one row in each half: 32 bits for each of 4 channels. */
AVX2_INLINE __m256i across_sums(const uint8_t *row, const uint8_t *next, const int16_t *weights, int count, __m256i half) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i order_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    __m256i sum = half;
    int j = 0;
    for (; j + 4 <= count; j += 4) {
        __m256i four = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(row + 4 * j))),
                                               _mm_loadu_si128((const __m128i *)(next + 4 * j)), 1);
        sum = add_products(sum, _mm256_shuffle_epi8(four, order), weight_pair(weights + j));
        sum = add_products(sum, _mm256_shuffle_epi8(four, order_high), weight_pair(weights + j + 2));
    }
    if (j < count) {
        __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(row + 4 * j))),
                                              _mm_loadl_epi64((const __m128i *)(next + 4 * j)), 1);
        sum = add_products(sum, _mm256_shuffle_epi8(two, order), weight_pair(weights + j));
    }
    return sum;
}

/* Four outputs of two rows, one row in each half: 4 bytes of each channel. */
AVX2_INLINE __m256i across_four(const uint8_t *row, const uint8_t *next, const Taps *taps, int output, int count) {
    const __m256i planes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i half = _mm256_set1_epi32(1 << (taps->precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(taps->precision);
    __m256i sum[4];
    for (int k = 0; k < 4; k++) {
        ptrdiff_t from = (ptrdiff_t)taps->first[output + k] * 4;
        const int16_t *weights = taps->weights + (output + k) * count;
        sum[k] = _mm256_sra_epi32(across_sums(row + from, next + from, weights, count, half), shift);
    }
    __m256i four = _mm256_packus_epi16(_mm256_packs_epi32(sum[0], sum[1]), _mm256_packs_epi32(sum[2], sum[3]));
    return _mm256_shuffle_epi8(four, planes);
}

/* Two rows of `count` taps into the rows `out` and `out_next` of planes. */
AVX2_INLINE void across_rows(const uint8_t *row, const uint8_t *next, const Taps *taps, uint8_t *out, uint8_t *out_next, int side, int count) {
    size_t plane = plane_stride(side);
    for (int i = 0; i < side; i += GROUP) {
        __m256i a = across_four(row, next, taps, i, count), b = across_four(row, next, taps, i + 4, count);
        __m256i red_green = _mm256_unpacklo_epi32(a, b), blue = _mm256_unpackhi_epi32(a, b);
        __m128i other = _mm256_extracti128_si256(red_green, 1);
        _mm_storel_epi64((__m128i *)(out + i), _mm256_castsi256_si128(red_green));
        _mm_storeh_pd((double *)(out + plane + i), _mm_castsi128_pd(_mm256_castsi256_si128(red_green)));
        _mm_storel_epi64((__m128i *)(out + 2 * plane + i), _mm256_castsi256_si128(blue));
        _mm_storel_epi64((__m128i *)(out_next + i), other);
        _mm_storeh_pd((double *)(out_next + plane + i), _mm_castsi128_pd(other));
        _mm_storel_epi64((__m128i *)(out_next + 2 * plane + i), _mm256_extracti128_si256(blue, 1));
    }
}

AVX2 static void across_avx2(const uint8_t *row, const uint8_t *next, const Taps *taps, uint8_t *out, uint8_t *out_next, int side) {
    switch (taps->count) { /* unrolled for the usual numbers of taps */
    case 2: across_rows(row, next, taps, out, out_next, side, 2); break;
    case 4: across_rows(row, next, taps, out, out_next, side, 4); break;
    case 6: across_rows(row, next, taps, out, out_next, side, 6); break;
    default: across_rows(row, next, taps, out, out_next, side, taps->count);
    }
}

/* A chunk of `count` rows. */
AVX2_INLINE __m256i down_chunk(const uint8_t *from, size_t stride, const int16_t *weights, int count, int precision) {
    const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (precision - 1));
    const __m128i shift = _mm_cvtsi32_si128(precision);
    __m256i s0 = half, s1 = half, s2 = half, s3 = half;
    for (int j = 0; j < count; j += 2, from += 2 * stride) {
        __m256i pair = weight_pair(weights + j);
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + stride));
        __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        s0 = add_products(s0, _mm256_unpacklo_epi8(low, zero), pair);
        s1 = add_products(s1, _mm256_unpackhi_epi8(low, zero), pair);
        s2 = add_products(s2, _mm256_unpacklo_epi8(high, zero), pair);
        s3 = add_products(s3, _mm256_unpackhi_epi8(high, zero), pair);
    }
    __m256i low = _mm256_packs_epi32(_mm256_sra_epi32(s0, shift), _mm256_sra_epi32(s1, shift));
    __m256i high = _mm256_packs_epi32(_mm256_sra_epi32(s2, shift), _mm256_sra_epi32(s3, shift));
    return _mm256_packus_epi16(low, high);
}

/* One row of one plane. */
AVX2_INLINE void down_row(const uint8_t *from, size_t stride, const int16_t *weights, int count, int precision, uint8_t *out, int side) {
    int x = 0;
    for (; x + CHUNK <= side; x += CHUNK)
        _mm256_storeu_si256((__m256i *)(out + x), down_chunk(from + x, stride, weights, count, precision));
    if (x < side) {
        uint8_t rest[CHUNK];
        _mm256_storeu_si256((__m256i *)rest, down_chunk(from + x, stride, weights, count, precision));
        memcpy(out + x, rest, (size_t)(side - x));
    }
}

AVX2 static void down_avx2(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side) {
    size_t plane = plane_stride(side), stride = 3 * plane;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y < side; y++, out += side) {
            const int16_t *weights = taps->weights + y * taps->count;
            const uint8_t *from = narrow + (size_t)taps->first[y] * stride + (size_t)c * plane;
            int used = taps_used(taps, y);
            switch (used) { /* unrolled for the usual numbers of taps */
            case 2: down_row(from, stride, weights, 2, taps->precision, out, side); break;
            case 4: down_row(from, stride, weights, 4, taps->precision, out, side); break;
            case 6: down_row(from, stride, weights, 6, taps->precision, out, side); break;
            default: down_row(from, stride, weights, used, taps->precision, out, side);
            }
        }
}
#endif

static int has_avx2(void) {
#if defined(__x86_64__)
    return cpu_has(CPU_AVX2);
#else
    return 0;
#endif
}

/* Filter `count` rows of 4-byte pixels across; the row buffer's column 0 is column -shift of the taps' inputs. */
static void resize_across(const uint8_t *rows, ptrdiff_t stride, int count, int shift, const Taps *taps, uint8_t *out, int side) {
    rows += (ptrdiff_t)shift * 4;
    size_t to = 3 * plane_stride(side);
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
static void resize_down(const uint8_t *narrow, const Taps *taps, uint8_t *out, int side) {
#if defined(__x86_64__)
    if (has_avx2()) {
        down_avx2(narrow, taps, out, side);
        return;
    }
#endif
    down_plain(narrow, taps, out, side);
}

#endif
