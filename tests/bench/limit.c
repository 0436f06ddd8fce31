/* The practical limit of loading training images on this machine: decode, RandomResizedCrop, flip, batches of uint8, with
   nothing around it. Tars are mapped, references to their JPEGs shuffled, and of each image only the rows and columns
   that its crop needs are decoded (jpeg_skip_scanlines, jpeg_crop_scanline), at the DCT scale that still covers the
   target, with libjpeg-turbo's accurate DCT and smooth upsampling, as a loader for training decodes.

     cc -O3 -march=native limit.c -o limit -ljpeg -lpthread -lm
     limit WORKERS BATCHES WARM_UP SHEET|- TAR...

   One thread per worker, each fills batches of its own. Prints what tests.bench.loaders.run prints; SHEET gets the first
   batch as raw bytes, (128, 224, 224, 3). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <jpeglib.h>

enum { SIDE = 224, BATCH = 128, CHANNELS = 3, ROW = SIDE * CHANNELS, ALIGN = 64, UNALIGNED = 8, MOST_TAPS = 64 };

typedef struct {
    const uint8_t *bytes;
    size_t size;
} Image;

static Image *images;
static size_t image_count, image_room;
static int batches, warm_up;
static const char *sheet;
static double began;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double cpu(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + 1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* ---- random numbers: splitmix64 of a counter ---- */

static uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static double uniform(uint64_t *state) { return (double)(mix((*state)++) >> 11) * 0x1p-53; }

/* ---- tar ---- */

static void map_tar(const char *path) {
    int fd = open(path, O_RDONLY);
    struct stat facts;
    if (fd < 0 || fstat(fd, &facts)) perror(path), exit(1);
    const uint8_t *tar = mmap(NULL, (size_t)facts.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (tar == MAP_FAILED) perror(path), exit(1);
    for (size_t at = 0; at + 512 <= (size_t)facts.st_size && tar[at];) {
        size_t size = strtoul((const char *)tar + at + 124, NULL, 8);
        const uint8_t *body = tar + at + 512;
        if (size > 3 && body[0] == 0xFF && body[1] == 0xD8) {
            if (image_count == image_room) images = realloc(images, (image_room = image_room * 2 + 1024) * sizeof *images);
            images[image_count++] = (Image){body, size};
        }
        at += 512 + ((size + 511) & ~(size_t)511);
    }
}

/* ---- the antialiased triangle filter: for each output a first input and 15-bit weights that sum to one ---- */

typedef struct {
    int count; /* weights of an output: even, nothing behind the last one */
    int first[SIDE + 4];
    int16_t weights[(SIDE + 4) * MOST_TAPS];
} Taps;

static void build_taps(Taps *taps, int from, int length, int limit) {
    double scale = (double)length / SIDE, reach = scale > 1 ? scale : 1, slope = 1 / reach;
    int room = ((int)ceil(2 * reach) + 2) & ~1;
    taps->count = room = room > MOST_TAPS ? MOST_TAPS : room;
    int end = from + length < limit ? from + length : limit;
    for (int i = 0; i < SIDE; i++) {
        double centre = from + scale * (i + 0.5), total = 0, exact[MOST_TAPS];
        int16_t *weights = taps->weights + i * room;
        int first = (int)(centre - reach + 0.5), last = (int)(centre + reach + 0.5), sum = 0, most = 0;
        first = first < from ? from : first;
        last = last > end ? end : last;
        int n = last - first > room ? room : last - first;
        for (int j = 0; j < n; j++) {
            double weight = 1 - fabs(first + j + 0.5 - centre) * slope;
            total += exact[j] = weight > 0 ? weight : 0;
        }
        total = 32767 / total;
        for (int j = 0; j < n; j++) {
            sum += weights[j] = (int16_t)(exact[j] * total + 0.5);
            if (weights[j] > weights[most]) most = j;
        }
        weights[most] = (int16_t)(weights[most] + 32767 - sum);
        for (int j = n; j < room; j++) weights[j] = 0;
        taps->first[i] = first;
    }
}

/* Vectors of the compiler: 32 bytes wide, whatever the machine makes of them. */
typedef int16_t s16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16 __attribute__((vector_size(32)));

#if defined(__AVX2__)
#include <immintrin.h>
/* round(a * b / 2^15) */
static inline s16 scaled(s16 a, s16 b) { return (s16)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
static inline void store_bytes(uint8_t *out, s16 v) {
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16((__m256i)v, (__m256i)v), 0xD8);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(packed));
}
static inline s16 load_bytes(const uint8_t *in) { return (s16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)in)); }
#else
static inline s16 scaled(s16 a, s16 b) {
    s16 r;
    for (int i = 0; i < 16; i++) r[i] = (int16_t)((a[i] * b[i] + (1 << 14)) >> 15);
    return r;
}
static inline void store_bytes(uint8_t *out, s16 v) {
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)(v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i]);
}
static inline s16 load_bytes(const uint8_t *in) {
    s16 r;
    for (int i = 0; i < 16; i++) r[i] = in[i];
    return r;
}
#endif

/* One output row of `bytes` bytes from `count` input rows, whose pixels stand in 7 bits of fraction meanwhile. Reads and
   writes up to 63 bytes more. */
static void filter_down(const uint8_t *const *rows, const int16_t *weights, int count, uint8_t *out, int bytes) {
    for (int x = 0; x < bytes; x += 64) {
        s16 a = (s16){} + 64, b = a, c = a, d = a;
        for (int j = 0; j < count; j++) {
            const uint8_t *row = rows[j] + x;
            s16 weight = (s16){} + weights[j];
            a += scaled(load_bytes(row) << 7, weight);
            b += scaled(load_bytes(row + 16) << 7, weight);
            c += scaled(load_bytes(row + 32) << 7, weight);
            d += scaled(load_bytes(row + 48) << 7, weight);
        }
        store_bytes(out + x, a >> 7), store_bytes(out + x + 16, b >> 7);
        store_bytes(out + x + 32, c >> 7), store_bytes(out + x + 48, d >> 7);
    }
}

#if defined(__AVX2__)
/* Four outputs at once: in each 64-bit lane the three channels of one. Reads up to 5 bytes behind a row. */
static inline __attribute__((always_inline)) void across(const uint8_t *row, const Taps *taps, uint8_t *out, int flip, int count) {
    const __m256i spread = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, 0, -1, 3, -1, 1, -1, 4, -1, 2,
                                            -1, 5, -1, -1, -1, -1, -1);
    const __m128i packed = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m128i mirrored = _mm_setr_epi8(12, 13, 14, 8, 9, 10, 4, 5, 6, 0, 1, 2, -1, -1, -1, -1);
    const __m256i half = _mm256_set1_epi32(1 << 14);
    for (int i = 0; i < SIDE; i += 4) {
        __m256i sums[2];
        for (int k = 0; k < 2; k++) {
            int a = i + 2 * k, b = a + 1;
            const uint8_t *from_a = row + 3 * taps->first[a], *from_b = row + 3 * taps->first[b];
            __m256i sum = half;
            for (int j = 0; j < count; j += 2) {
                int wa, wb;
                memcpy(&wa, taps->weights + a * count + j, 4);
                memcpy(&wb, taps->weights + b * count + j, 4);
                __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i *)(from_a + 3 * j))),
                                                      _mm_loadl_epi64((const __m128i *)(from_b + 3 * j)), 1);
                __m256i pair = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi32(wa)), _mm_set1_epi32(wb), 1);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(two, spread), pair));
            }
            sums[k] = _mm256_srai_epi32(sum, 15);
        }
        __m256i words = _mm256_packs_epi32(sums[0], sums[1]); /* outputs 0 and 2 in the lower half, 1 and 3 in the upper */
        __m256i bytes = _mm256_packus_epi16(words, words);
        __m128i four = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        four = _mm_shuffle_epi8(four, flip ? mirrored : packed);
        uint8_t *at = out + 3 * (flip ? SIDE - 4 - i : i);
        uint32_t tail = (uint32_t)_mm_extract_epi32(four, 2);
        _mm_storel_epi64((__m128i *)at, four), memcpy(at + 8, &tail, 4);
    }
}

/* Unrolled for the usual numbers of taps. */
static void filter_across(const uint8_t *row, const Taps *taps, uint8_t *out, int flip) {
    switch (taps->count) {
    case 4: across(row, taps, out, flip, 4); break;
    case 6: across(row, taps, out, flip, 6); break;
    case 8: across(row, taps, out, flip, 8); break;
    default: across(row, taps, out, flip, taps->count);
    }
}
#else
static void filter_across(const uint8_t *row, const Taps *taps, uint8_t *out, int flip) {
    for (int i = 0; i < SIDE; i++)
        for (int c = 0; c < CHANNELS; c++) {
            int sum = 1 << 14;
            for (int j = 0; j < taps->count; j++) sum += taps->weights[i * taps->count + j] * row[3 * (taps->first[i] + j) + c];
            out[3 * (flip ? SIDE - 1 - i : i) + c] = (uint8_t)(sum >> 15);
        }
}
#endif

/* ---- one image ---- */

typedef struct {
    struct jpeg_error_mgr base;
    jmp_buf failed;
} Errors;

static void on_error(j_common_ptr info) { longjmp(((Errors *)info->err)->failed, 1); }
static void on_message(j_common_ptr info) { (void)info; }
static void on_level(j_common_ptr info, int level) { (void)info, (void)level; }

typedef struct {
    struct jpeg_decompress_struct d;
    Errors errors;
    Taps across, down;
    uint8_t *rows; /* the decoded part, or the part already filtered across */
    uint8_t *block;
    size_t room;
    uint64_t random;
} Worker;

typedef struct {
    int left, top, width, height, flip;
} Crop;

/* As torchvision's RandomResizedCrop draws: ten tries of an area and a ratio, else the middle. */
static Crop draw_crop(int width, int height, uint64_t *random) {
    Crop crop = {.flip = uniform(random) < 0.5};
    for (int i = 0; i < 10; i++) {
        double area = (0.08 + 0.92 * uniform(random)) * width * height;
        double ratio = exp(log(0.75) + uniform(random) * log(16.0 / 9));
        crop.width = (int)lrint(sqrt(area * ratio)), crop.height = (int)lrint(sqrt(area / ratio));
        if (crop.width < 1 || crop.height < 1 || crop.width > width || crop.height > height) continue;
        crop.left = (int)(uniform(random) * (width - crop.width + 1)), crop.top = (int)(uniform(random) * (height - crop.height + 1));
        return crop;
    }
    crop.width = (double)width / height > 4.0 / 3 ? (int)lrint(height * 4.0 / 3) : width;
    crop.height = (double)width / height < 0.75 ? (int)lrint(width / 0.75) : height;
    crop.left = (width - crop.width) / 2, crop.top = (height - crop.height) / 2;
    return crop;
}

static void shrink(Crop *crop, struct jpeg_decompress_struct *d) {
    int k = 1, least = crop->width < crop->height ? crop->width : crop->height;
    while (k < 8 && least >= 2 * k * SIDE) k *= 2;
    d->scale_num = 1, d->scale_denom = (unsigned)k;
    crop->left /= k, crop->top /= k, crop->width /= k, crop->height /= k;
}

/* Rows of the crop one after another; those filtered across need less room, and less work where the crop is flat. */
static void decode(Worker *w, const Image *image, uint8_t *out) {
    struct jpeg_decompress_struct *d = &w->d;
    jpeg_mem_src(d, image->bytes, image->size);
    jpeg_read_header(d, TRUE);
    Crop crop = draw_crop((int)d->image_width, (int)d->image_height, &w->random);
    shrink(&crop, d);
    d->out_color_space = JCS_RGB;
    jpeg_start_decompress(d);
    int end = crop.left + crop.width + 4, full = (int)d->output_width;
    JDIMENSION x = (JDIMENSION)(crop.left > 4 ? crop.left - 4 : 0), width = (JDIMENSION)(end > full ? full : end) - x;
    if ((int)width < full) jpeg_crop_scanline(d, &x, &width);
    if (crop.top) jpeg_skip_scanlines(d, (JDIMENSION)crop.top);
    build_taps(&w->across, crop.left - (int)x, crop.width, (int)width);
    build_taps(&w->down, 0, crop.height, crop.height);
    int across_first = crop.height < SIDE;
    size_t stride = ((across_first ? (size_t)ROW : (size_t)width * CHANNELS) + 2 * ALIGN) & ~(size_t)(ALIGN - 1);
    size_t row_bytes = ((size_t)width * CHANNELS + 8 * ALIGN) & ~(size_t)(ALIGN - 1);
    size_t needed = stride * (size_t)crop.height + 4 * row_bytes;
    if (w->room < needed + ALIGN) free(w->block), w->block = aligned_alloc(ALIGN, w->room = ((needed + ALIGN) * 3 / 2) & ~(size_t)(ALIGN - 1));
    w->rows = w->block + UNALIGNED;
    uint8_t *fresh = w->rows + stride * (size_t)crop.height; /* four rows as they come, where they are filtered at once */
    for (int y = 0, done = 0; y < crop.height;) {
        uint8_t *at[4];
        int wanted = crop.height - y < 4 ? crop.height - y : 4;
        for (int i = 0; i < wanted; i++) at[i] = across_first ? fresh + row_bytes * (size_t)i : w->rows + stride * (size_t)(y + i);
        int got = (int)jpeg_read_scanlines(d, at, (JDIMENSION)wanted);
        if (got <= 0) longjmp(w->errors.failed, 1);
        for (int i = 0; i < got && across_first; i++) filter_across(at[i], &w->across, w->rows + stride * (size_t)(y + i), crop.flip);
        y += got;
        for (; done < SIDE; done++) {
            const int16_t *weights = w->down.weights + done * w->down.count;
            int first = w->down.first[done], count = w->down.count;
            const uint8_t *rows[MOST_TAPS];
            while (count > 1 && !weights[count - 1]) count--;
            if (first + count > y) break;
            for (int j = 0; j < count; j++) rows[j] = w->rows + stride * (size_t)(first + j);
            if (across_first) {
                filter_down(rows, weights, count, out + (size_t)done * ROW, ROW);
            } else {
                int skip = 3 * (crop.left - (int)x), bytes = 3 * crop.width;
                for (int j = 0; j < count; j++) rows[j] += skip;
                filter_down(rows, weights, count, w->rows + stride * (size_t)first + skip, bytes);
                filter_across(w->rows + stride * (size_t)first, &w->across, out + (size_t)done * ROW, crop.flip);
            }
        }
    }
}

/* ---- workers ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t *order;
static int taken, finished, failures;
static double first_batch_s, start_wall, start_cpu, end_wall, end_cpu;

static void *work(void *number) {
    Worker *w = calloc(1, sizeof *w);
    w->random = (uint64_t)(uintptr_t)number << 40;
    w->d.err = jpeg_std_error(&w->errors.base);
    w->errors.base.error_exit = on_error, w->errors.base.output_message = on_message, w->errors.base.emit_message = on_level;
    jpeg_create_decompress(&w->d);
    uint8_t *batch = malloc((size_t)BATCH * SIDE * ROW + ALIGN);
    for (;;) {
        pthread_mutex_lock(&lock);
        int mine = taken < batches + warm_up ? taken++ : -1;
        pthread_mutex_unlock(&lock);
        if (mine < 0) return NULL;
        for (volatile int i = 0; i < BATCH; i++) {
            const Image *image = &images[order[((size_t)mine * BATCH + (size_t)i) % image_count]];
            if (setjmp(w->errors.failed)) __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);
            else decode(w, image, batch + (size_t)i * SIDE * ROW);
            jpeg_abort_decompress(&w->d);
        }
        pthread_mutex_lock(&lock);
        finished++;
        if (mine == 0) {
            first_batch_s = now() - began;
            if (strcmp(sheet, "-")) {
                FILE *file = fopen(sheet, "wb");
                fwrite(batch, 1, (size_t)BATCH * SIDE * ROW, file), fclose(file);
            }
        }
        if (finished == warm_up) start_wall = now(), start_cpu = cpu();
        if (finished == batches + warm_up) end_wall = now(), end_cpu = cpu();
        pthread_mutex_unlock(&lock);
    }
}

int main(int count, char **argument) {
    began = now();
    int workers = atoi(argument[1]);
    batches = atoi(argument[2]), warm_up = atoi(argument[3]), sheet = argument[4];
    for (int i = 5; i < count; i++) map_tar(argument[i]);
    order = malloc(image_count * sizeof *order);
    uint64_t random = 1;
    for (size_t i = 0; i < image_count; i++) {
        size_t j = (size_t)(uniform(&random) * (double)(i + 1));
        order[i] = order[j], order[j] = i;
    }
    pthread_t threads[256];
    for (intptr_t i = 0; i < workers; i++) pthread_create(&threads[i], NULL, work, (void *)i);
    for (int i = 0; i < workers; i++) pthread_join(threads[i], NULL);
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    long mapped = 0; /* the tars are mapped: clean pages of the page cache, not this process's own memory */
    FILE *status = fopen("/proc/self/status", "r");
    for (char line[256]; status && fgets(line, sizeof line, status);) sscanf(line, "RssAnon: %ld", &mapped);
    printf("{\"images\": %d, \"wall_s\": %.6f, \"cpu_s\": %.6f, \"first_batch_s\": %.4f, \"memory_mib_per_worker\": %.1f, \"failed\": %d}\n",
           batches * BATCH, end_wall - start_wall, end_cpu - start_cpu, first_batch_s, (double)mapped / 1024 / workers, failures);
    return 0;
}
