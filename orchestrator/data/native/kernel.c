/* From encoded JPEGs to a batch of pixels: only the region of each crop is decoded, resized with antialiasing and
   written where it belongs, (n, 3, S, S) uint8. One call a batch, without Python and without its lock.

   Whatever is unusual (other formats, CMYK, EXIF turns, damage) is left to the caller by status OTHER. */
#define _GNU_SOURCE /* memmem */
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "huffman.h"
#include "jpeg_file.h"
#include "libjpeg.h"
#include "resize.h"

#define EXPORT __attribute__((visibility("default")))

enum { DONE = 0, OTHER = 1, SHORT_READ = 2 };
enum { LEAST_WIDTH = 5 }; /* pixels in which libjpeg upsamples chroma smoothly: three columns of it */
enum { UNALIGNED = 8 };   /* libjpeg-turbo writes aligned rows past the cache, and reading them back costs half of the speed */
enum { HEADER_READ = 4096, ROWS_AT_ONCE = 8 };

/* One image of a batch; the same layout as JOB in kernel.py. */
typedef struct {
    int64_t offset; /* byte of the file, or the address of the bytes where fd < 0 */
    int64_t size;
    double box[4];  /* left, top, right, bottom of the crop in pixels of the image */
    int32_t fd;
    int32_t flip;   /* mirror left and right */
    int32_t clip;   /* nothing outside the box counts, else the filter's support reaches beyond it */
    int32_t scaled; /* a smaller DCT may be used where it still covers the target */
    int32_t width, height; /* found by kernel_sizes; 0 = left to the caller */
    int32_t status;
    int32_t row;    /* of the batch */
} Job;

#define DECLARE(result, name, arguments) static result(*name) arguments;
LIBJPEG_FUNCTIONS(DECLARE)

static __thread struct {
    double decoder[D_SIZE / 8 + 8], errors[E_SIZE / 8 + 8]; /* double: aligned */
    int ready, warnings;
    jmp_buf failed;
    uint8_t *file, *joined, *rows, *narrow; /* grown as needed, kept for the next image */
    size_t file_room, joined_room, rows_room, narrow_room;
    Taps across, down;
    HuffmanTable tables[2][TABLES]; /* of DC and AC values */
    HuffmanScan scan;
} own;

static void on_error(void *cinfo) {
    (void)cinfo;
    longjmp(own.failed, 1);
}

static void on_message(void *cinfo, int level) {
    (void)cinfo;
    own.warnings += level < 0; /* libjpeg's "corrupt data, made something up" */
}

static void no_output(void *cinfo) { (void)cinfo; }

static void *error_manager(void) {
    void *errors = jpeg_std_error(own.errors);
    FIELD(errors, E_ERROR_EXIT, on_object) = on_error;
    FIELD(errors, E_EMIT_MESSAGE, on_object_and_level) = on_message;
    FIELD(errors, E_OUTPUT_MESSAGE, on_object) = no_output;
    return errors;
}

/* Returns 0, or why the library cannot be used: 1 not loaded, 2 a function is missing, 3 other structures. */
EXPORT int kernel_open(const char *libjpeg) {
    void *library = dlopen(libjpeg, RTLD_NOW | RTLD_LOCAL);
    if (!library) return 1;
#define RESOLVE(result, name, arguments) \
    if (!(*(void **)&name = dlsym(library, #name))) return 2;
    LIBJPEG_FUNCTIONS(RESOLVE)
    if (setjmp(own.failed)) return 3; /* the library compares version and size with its own */
    double compressor[C_SIZE / 8 + 8];
    FIELD(own.decoder, D_ERR, void *) = error_manager();
    jpeg_CreateDecompress(own.decoder, LIBJPEG_VERSION, D_SIZE);
    FIELD(compressor, C_ERR, void *) = FIELD(own.decoder, D_ERR, void *);
    jpeg_CreateCompress(compressor, LIBJPEG_VERSION, C_SIZE);
    jpeg_destroy(compressor);
    own.ready = 1;
    return 0;
}

static void *decoder(void) {
    if (!own.ready) {
        FIELD(own.decoder, D_ERR, void *) = error_manager();
        jpeg_CreateDecompress(own.decoder, LIBJPEG_VERSION, D_SIZE);
        own.ready = 1;
    }
    own.warnings = 0;
    return own.decoder;
}

static uint8_t *room(uint8_t **buffer, size_t *has, size_t needed) {
    if (*has < needed) {
        free(*buffer);
        *has = needed + needed / 2;
        *buffer = malloc(*has);
    }
    return *buffer;
}

/* The first `wanted` bytes of a job's file. */
static const uint8_t *fetch(const Job *job, size_t wanted) {
    if (job->fd < 0) return (const uint8_t *)(intptr_t)job->offset;
    uint8_t *bytes = room(&own.file, &own.file_room, wanted);
    size_t got = 0;
    while (got < wanted) {
        ssize_t count = pread(job->fd, bytes + got, wanted - got, job->offset + (int64_t)got);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return NULL;
        got += (size_t)count;
    }
    return bytes;
}

/* Width and height of each image that the kernel decodes; 0 where the caller must. */
EXPORT void kernel_sizes(Job *jobs, int count, int64_t max_pixels) {
    for (int i = 0; i < count; i++) {
        Job *job = &jobs[i];
        JpegFile file;
        size_t first = job->size < HEADER_READ ? (size_t)job->size : HEADER_READ;
        const uint8_t *bytes = fetch(job, first);
        int found = bytes ? jpeg_file_parse(&file, bytes, first) : JPEG_OTHER;
        if (found == JPEG_CUT && (bytes = fetch(job, (size_t)job->size)))
            found = jpeg_file_parse(&file, bytes, (size_t)job->size);
        int fits = found == JPEG_OK && (int64_t)file.width * file.height <= max_pixels;
        job->width = fits ? file.width : 0;
        job->height = fits ? file.height : 0;
        job->status = !bytes ? SHORT_READ : fits ? DONE : OTHER;
    }
}

typedef struct {
    int left, top, right, bottom;
} Region;

static int clamp(int value, int low, int high) { return value < low ? low : value > high ? high : value; }

/* Pixels that an output of `side` reads: the box, and beyond it what the filter reaches. */
static Region needed(const Job *job, int side, int cubic) {
    if (job->clip) return (Region){(int)job->box[0], (int)job->box[1], (int)job->box[2], (int)job->box[3]};
    double reach = cubic ? 2.0 : 1.0;
    double x = fmax(1.0, (job->box[2] - job->box[0]) / side) * reach + 1;
    double y = fmax(1.0, (job->box[3] - job->box[1]) / side) * reach + 1;
    return (Region){clamp((int)floor(job->box[0] - x), 0, job->width), clamp((int)floor(job->box[1] - y), 0, job->height),
                    clamp((int)ceil(job->box[2] + x), 0, job->width), clamp((int)ceil(job->box[3] + y), 0, job->height)};
}

/* The region with what its pixels depend on: smooth chroma reaches a pixel further, and is not used in what is narrow. */
static Region surroundings(Region region, int width, int height) {
    int left = region.left - 1, right = region.right + 1;
    left = left < width - LEAST_WIDTH ? left : width - LEAST_WIDTH;
    right = right > LEAST_WIDTH ? right : LEAST_WIDTH;
    return (Region){clamp(left, 0, width), clamp(region.top - 1, 0, height), clamp(right, 0, width), clamp(region.bottom + 1, 0, height)};
}

/* Greatest k of 1, 2, 4, 8 such that a DCT of 8 / k points still gives at least `side` pixels each way. */
static int scale_of(const Job *job, int side) {
    double least = fmin(job->box[2] - job->box[0], job->box[3] - job->box[1]);
    int k = 1;
    while (job->scaled && k < 8 && least >= 2.0 * k * side) k *= 2;
    return k;
}

/* Decode rows of `region` (pixels of the file given to libjpeg, already scaled) and filter each across as it comes. */
static void decode_region(void *d, Region region, const Taps *across, int left_is, uint8_t *narrow, int side) {
    int full_width = (int)FIELD(d, D_OUTPUT_WIDTH, unsigned);
    Region wide = surroundings(region, full_width, region.bottom);
    unsigned x = (unsigned)wide.left, width = (unsigned)(wide.right - wide.left);
    if (width < (unsigned)full_width) jpeg_crop_scanline(d, &x, &width);
    if (region.top > 0) jpeg_skip_scanlines(d, (unsigned)region.top);
    size_t stride = (((size_t)width + (size_t)across->count) * 4 + 63) & ~(size_t)63; /* weights of nothing may stand behind the end */
    uint8_t *rows = room(&own.rows, &own.rows_room, stride * ROWS_AT_ONCE + 64 + UNALIGNED), *at[ROWS_AT_ONCE];
    rows += -(uintptr_t)rows % 64 + UNALIGNED;
    for (int i = 0; i < ROWS_AT_ONCE; i++) at[i] = rows + stride * (size_t)i;
    int shift = left_is - (int)x; /* column of the row buffer that holds the image's column `left_is` */
    size_t narrow_stride = narrow_bytes(0, side);
    for (int y = region.top, count; y < region.bottom; y += count, narrow += narrow_stride * (size_t)count) {
        int wanted = region.bottom - y < ROWS_AT_ONCE ? region.bottom - y : ROWS_AT_ONCE;
        for (count = 0; count < wanted;) { /* libjpeg gives one or two at a time */
            unsigned got = jpeg_read_scanlines(d, at + count, (unsigned)(wanted - count));
            if (!got) longjmp(own.failed, 1);
            count += (int)got;
        }
        resize_across(rows, (ptrdiff_t)stride, count, shift, across, narrow, side);
    }
}

static int on_mcu(void *d, int16_t **blocks) {
    HuffmanScan *scan = FIELD(d, D_CLIENT_DATA, HuffmanScan *);
    if (!scan->read_mcu(scan, blocks)) longjmp(own.failed, 1);
    return 1;
}

static const HuffmanTable *table_of(void *d, int is_ac, int number) {
    if (number < 0 || number >= TABLES) longjmp(own.failed, 1);
    const uint8_t *found = FIELD(d, (is_ac ? D_AC_TABLES : D_DC_TABLES) + 8 * number, const uint8_t *);
    if (!found) longjmp(own.failed, 1);
    huffman_build(&own.tables[is_ac][number], found + T_BITS, found + T_VALUES);
    return &own.tables[is_ac][number];
}

static int is_of_library(void *function) {
    Dl_info found, known;
    return dladdr(function, &found) && dladdr(*(void **)&jpeg_start_decompress, &known) && found.dli_fbase == known.dli_fbase;
}

/* Whether the entropy decoder is laid out as we know it: it begins with two functions of the library. Asked once. */
static int knows_entropy_decoder(void *entropy) {
    static int known = -1;
    if (known < 0) known = is_of_library(FIELD(entropy, 0, void *)) && is_of_library(FIELD(entropy, H_DECODE_MCU, void *));
    return known;
}

/* Have the only scan of a baseline file, which is about to begin, read by huffman.h in place of libjpeg. */
static void read_scan_ourselves(void *d) {
    if (!knows_entropy_decoder(FIELD(d, D_ENTROPY, void *))) return;
    HuffmanScan *scan = &own.scan;
    void *source = FIELD(d, D_SRC, void *);
    huffman_start(scan, FIELD(source, S_NEXT, const uint8_t *), FIELD(source, S_LEFT, size_t), (int)FIELD(d, D_RESTART_INTERVAL, unsigned));
    huffman_choose(scan);
    scan->blocks = FIELD(d, D_BLOCKS_IN_MCU, int);
    for (int i = 0; i < scan->blocks; i++) {
        int component = FIELD(d, D_MCU_MEMBERSHIP + 4 * i, int);
        void *info = FIELD(d, D_CUR_COMP_INFO + 8 * component, void *);
        scan->block[i] = (HuffmanBlock){table_of(d, 0, FIELD(info, I_DC_TABLE, int)), table_of(d, 1, FIELD(info, I_AC_TABLE, int)), component};
    }
    FIELD(d, D_CLIENT_DATA, HuffmanScan *) = scan;
    FIELD(FIELD(d, D_ENTROPY, void *), H_DECODE_MCU, decode_mcu_fn) = on_mcu;
}

/* Whether the last scans of a progressive file are missing: libjpeg smooths over that, across a region's borders. */
static int lacks_scans(void *d) {
    enum { SMOOTHED = 10 }; /* coefficients of a block that its smoothing guesses */
    const int *bits = FIELD(d, D_COEF_BITS, const int *); /* 64 of each component, NULL where it is not progressive */
    for (int c = 0; bits && c < FIELD(d, D_NUM_COMPONENTS, int); c++)
        for (int i = 0; i < SMOOTHED; i++)
            if (bits[64 * c + i]) return 1;
    return 0;
}

/* Fill the row of a job from its file; ends by longjmp where libjpeg gives up. */
static void decode_file(void *d, Job *job, const JpegFile *file, const uint8_t *bytes, int side, int cubic, uint8_t *out) {
    size_t size = (size_t)job->size;
    int k = scale_of(job, side);
    Region region = needed(job, side, cubic);
    int x0 = 0, y0 = 0;
    if (file->interval && k == 1) {
        Region wide = surroundings(region, file->width, file->height);
        Window window = jpeg_file_window(file, wide.left, wide.top, wide.right, wide.bottom);
        uint8_t *joined = room(&own.joined, &own.joined_room, size + 16);
        size_t length = jpeg_file_join(file, bytes, size, &window, joined);
        if (length) bytes = joined, size = length, x0 = window.left, y0 = window.top;
    }
    jpeg_mem_src(d, bytes, size);
    jpeg_read_header(d, 1);
    FIELD(d, D_OUT_COLOR_SPACE, int) = JCS_EXT_RGBX;
    FIELD(d, D_SCALE_NUM, unsigned) = 1;
    FIELD(d, D_SCALE_DENOM, unsigned) = (unsigned)k;
    jpeg_start_decompress(d);
    if (lacks_scans(d)) longjmp(own.failed, 1);
    if (file->baseline) read_scan_ourselves(d);
    if (k > 1) { /* from here on everything is in pixels of the scaled image */
        int width = (int)FIELD(d, D_OUTPUT_WIDTH, unsigned), height = (int)FIELD(d, D_OUTPUT_HEIGHT, unsigned);
        region = (Region){region.left / k, region.top / k, clamp((region.right + k - 1) / k, 1, width),
                          clamp((region.bottom + k - 1) / k, 1, height)};
    }
    Span columns = {job->box[0] / k, job->box[2] / k, region.left, region.right, job->flip};
    Span lines = {job->box[1] / k, job->box[3] / k, region.top, region.bottom, 0};
    taps_build(&own.across, columns, side, cubic);
    taps_build(&own.down, lines, side, cubic);
    uint8_t *narrow = room(&own.narrow, &own.narrow_room, narrow_bytes(region.bottom - region.top, side));
    Region inside = {region.left - x0, region.top - y0, region.right - x0, region.bottom - y0};
    decode_region(d, inside, &own.across, inside.left, narrow, side);
    jpeg_abort(d);
    if (own.warnings) return; /* the caller's decoder decides what damaged bytes are worth */
    resize_down(narrow, &own.down, out + (size_t)job->row * 3 * (size_t)side * (size_t)side, side);
    job->status = DONE;
}

static void decode_guarded(Job *job, const JpegFile *file, const uint8_t *bytes, int side, int cubic, uint8_t *out) {
    void *d = decoder();
    if (setjmp(own.failed)) jpeg_abort(d);
    else decode_file(d, job, file, bytes, side, cubic, out);
}

static void decode_one(Job *job, int side, int cubic, uint8_t *out) {
    const uint8_t *bytes = fetch(job, (size_t)job->size);
    JpegFile file;
    job->status = bytes ? OTHER : SHORT_READ;
    if (!bytes || jpeg_file_parse(&file, bytes, (size_t)job->size) != JPEG_OK) return;
    if (file.width != job->width || file.height != job->height || !jpeg_file_is_whole(bytes, (size_t)job->size)) return;
    decode_guarded(job, &file, bytes, side, cubic, out);
}

/* Decode, crop and resize every job with a width into its row of `out`, (n, 3, side, side) uint8. */
EXPORT void kernel_decode(Job *jobs, int count, int side, int cubic, uint8_t *out) {
    for (int i = 0; i < count; i++)
        if (jobs[i].width) decode_one(&jobs[i], side, cubic, out);
}

EXPORT int kernel_job_size(void) { return (int)sizeof(Job); }

/* ---- crop-ready files ---- */

static int same_coefficients(void *a, void **arrays_a, void *b, void **arrays_b) {
    int components = FIELD(a, D_NUM_COMPONENTS, int);
    if (components != FIELD(b, D_NUM_COMPONENTS, int)) return 0;
    access_virt_barray_fn rows_a = FIELD(FIELD(a, D_MEM, void *), M_ACCESS_VIRT_BARRAY, access_virt_barray_fn);
    access_virt_barray_fn rows_b = FIELD(FIELD(b, D_MEM, void *), M_ACCESS_VIRT_BARRAY, access_virt_barray_fn);
    for (int c = 0; c < components; c++) {
        char *info_a = FIELD(a, D_COMP_INFO, char *) + c * I_SIZE, *info_b = FIELD(b, D_COMP_INFO, char *) + c * I_SIZE;
        unsigned width = FIELD(info_a, I_WIDTH_IN_BLOCKS, unsigned), height = FIELD(info_a, I_HEIGHT_IN_BLOCKS, unsigned);
        if (width != FIELD(info_b, I_WIDTH_IN_BLOCKS, unsigned) || height != FIELD(info_b, I_HEIGHT_IN_BLOCKS, unsigned) ||
            FIELD(info_a, I_H_SAMP, int) != FIELD(info_b, I_H_SAMP, int) || FIELD(info_a, I_V_SAMP, int) != FIELD(info_b, I_V_SAMP, int) ||
            memcmp(FIELD(info_a, I_QUANT_TABLE, void *), FIELD(info_b, I_QUANT_TABLE, void *), 128))
            return 0;
        for (unsigned y = 0; y < height; y++) {
            void **row_a = rows_a(a, arrays_a[c], y, 1, 0), **row_b = rows_b(b, arrays_b[c], y, 1, 0);
            if (memcmp(row_a[0], row_b[0], (size_t)width * 128)) return 0;
        }
    }
    return 1;
}

/* Write the coefficients of a JPEG again with a restart marker every `interval` MCUs and fitting Huffman tables, and
   prove it: the result's coefficients and tables are read back and compared. Returns the length, 0 where it cannot be
   done; *result is to be given to kernel_free. */
EXPORT int64_t kernel_crop_ready(const uint8_t *bytes, int64_t size, int interval, uint8_t **result) {
    double source[D_SIZE / 8 + 8], proof[D_SIZE / 8 + 8], target[C_SIZE / 8 + 8];
    unsigned char *written = NULL;
    unsigned long length = 0;
    volatile int created = 0, finished = 0, equal = 0;
    *result = NULL;
    own.warnings = 0;
    void *errors = error_manager();
    if (!setjmp(own.failed)) {
        FIELD(source, D_ERR, void *) = FIELD(proof, D_ERR, void *) = FIELD(target, C_ERR, void *) = errors;
        jpeg_CreateDecompress(source, LIBJPEG_VERSION, D_SIZE), created = 1;
        jpeg_CreateDecompress(proof, LIBJPEG_VERSION, D_SIZE), created = 2;
        jpeg_CreateCompress(target, LIBJPEG_VERSION, C_SIZE), created = 3;
        jpeg_mem_src(source, bytes, (unsigned long)size);
        jpeg_read_header(source, 1);
        void **arrays = jpeg_read_coefficients(source);
        jpeg_copy_critical_parameters(source, target);
        FIELD(target, C_OPTIMIZE_CODING, int) = 1;
        FIELD(target, C_RESTART_INTERVAL, unsigned) = (unsigned)interval;
        jpeg_mem_dest(target, &written, &length);
        jpeg_write_coefficients(target, arrays);
        jpeg_finish_compress(target);
        finished = 1;
        jpeg_mem_src(proof, written, length);
        jpeg_read_header(proof, 1);
        equal = same_coefficients(source, arrays, proof, jpeg_read_coefficients(proof)) && !own.warnings;
    }
    if (created > 2) jpeg_destroy(target);
    if (created > 1) jpeg_destroy(proof);
    if (created > 0) jpeg_destroy(source);
    if (!equal) {
        if (finished) free(written); /* before that the library may have moved it */
        return 0;
    }
    *result = written;
    return (int64_t)length;
}

EXPORT void kernel_free(uint8_t *bytes) { free(bytes); }

/* Width, height, MCU width and height in pixels, restart interval in MCUs, 1 for baseline; 0 where it is no plain JPEG. */
EXPORT int kernel_describe(const uint8_t *bytes, int64_t size, int32_t facts[6]) {
    JpegFile file;
    if (jpeg_file_parse(&file, bytes, (size_t)size) != JPEG_OK) return 0;
    int32_t found[6] = {file.width, file.height, file.mcu_width, file.mcu_height, file.interval, file.baseline};
    memcpy(facts, found, sizeof found);
    return jpeg_file_is_whole(bytes, (size_t)size);
}
