/* The part of libjpeg's binary interface 6.2 (LP64) that the kernel needs, resolved at run time.

   Pillow's wheels carry libjpeg-turbo with this interface, without headers. Its structures are reached by the offsets
   of their fields, which the interface fixes; a test compares the offsets with the system's header where one is
   installed, and kernel_open() refuses a library that disagrees about the structures' sizes. */
#ifndef ORCHESTRATOR_LIBJPEG_H
#define ORCHESTRATOR_LIBJPEG_H

#include <stddef.h>
#include <stdint.h>

#define LIBJPEG_VERSION 62
#define FIELD(object, offset, type) (*(type *)((char *)(object) + (offset)))

/* jpeg_decompress_struct */
enum {
    D_SIZE = 632,
    D_ERR = 0,
    D_MEM = 8,
    D_CLIENT_DATA = 24,
    D_SRC = 40,
    D_IMAGE_WIDTH = 48,
    D_IMAGE_HEIGHT = 52,
    D_NUM_COMPONENTS = 56,
    D_OUT_COLOR_SPACE = 64,
    D_SCALE_NUM = 68,
    D_SCALE_DENOM = 72,
    D_OUTPUT_WIDTH = 136,
    D_OUTPUT_HEIGHT = 140,
    D_OUTPUT_SCANLINE = 168,
    D_COEF_BITS = 192,
    D_DC_TABLES = 232,
    D_AC_TABLES = 264,
    D_COMP_INFO = 304,
    D_RESTART_INTERVAL = 368,
    D_CUR_COMP_INFO = 440,
    D_BLOCKS_IN_MCU = 480,
    D_MCU_MEMBERSHIP = 484,
    D_ENTROPY = 592,
};
/* jpeg_compress_struct */
enum { C_SIZE = 520, C_ERR = 0, C_OPTIMIZE_CODING = 264, C_RESTART_INTERVAL = 280 };
/* jpeg_error_mgr */
enum { E_SIZE = 168, E_ERROR_EXIT = 0, E_EMIT_MESSAGE = 8, E_OUTPUT_MESSAGE = 16 };
/* jpeg_memory_mgr */
enum { M_ACCESS_VIRT_BARRAY = 64 };
/* jpeg_component_info */
enum { I_SIZE = 96, I_H_SAMP = 8, I_V_SAMP = 12, I_DC_TABLE = 20, I_AC_TABLE = 24, I_WIDTH_IN_BLOCKS = 28, I_HEIGHT_IN_BLOCKS = 32, I_QUANT_TABLE = 80 };
/* JHUFF_TBL, jpeg_source_mgr */
enum { T_BITS = 0, T_VALUES = 17, S_NEXT = 0, S_LEFT = 8 };
/* jpeg_entropy_decoder, which is in no public header: start_pass, decode_mcu, both as in every version since 1998 */
enum { H_DECODE_MCU = 8 };
enum { JCS_EXT_RGBX = 7 };

typedef void (*on_object)(void *);
typedef void (*on_object_and_level)(void *, int);
typedef int (*decode_mcu_fn)(void *cinfo, int16_t **blocks);
typedef void *(*access_virt_barray_fn)(void *cinfo, void *array, unsigned start, unsigned rows, int writable);

#define LIBJPEG_FUNCTIONS(X)                                                        \
    X(void *, jpeg_std_error, (void *))                                             \
    X(void, jpeg_CreateDecompress, (void *, int, size_t))                           \
    X(void, jpeg_CreateCompress, (void *, int, size_t))                             \
    X(void, jpeg_mem_src, (void *, const unsigned char *, unsigned long))           \
    X(void, jpeg_mem_dest, (void *, unsigned char **, unsigned long *))             \
    X(int, jpeg_read_header, (void *, int))                                         \
    X(int, jpeg_start_decompress, (void *))                                         \
    X(void, jpeg_crop_scanline, (void *, unsigned *, unsigned *))                   \
    X(unsigned, jpeg_skip_scanlines, (void *, unsigned))                            \
    X(unsigned, jpeg_read_scanlines, (void *, unsigned char **, unsigned))          \
    X(void, jpeg_abort, (void *))                                                   \
    X(void *, jpeg_read_coefficients, (void *))                                     \
    X(void, jpeg_copy_critical_parameters, (void *, void *))                        \
    X(void, jpeg_write_coefficients, (void *, void *))                              \
    X(void, jpeg_finish_compress, (void *))                                         \
    X(void, jpeg_destroy, (void *))

#endif
