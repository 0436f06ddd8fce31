/* The coefficients of a baseline scan, faster than libjpeg reads them: a symbol and the bits of its value are
   found by one look at the next LOOK bits, and bytes come eight at a time.

   Stricter than libjpeg: what it mends, with a warning or in silence, is no scan here. */
#ifndef ORCHESTRATOR_HUFFMAN_H
#define ORCHESTRATOR_HUFFMAN_H

#include <stdint.h>
#include <string.h>

#include "cpu.h"

enum { LOOK = 10, LONGEST = 16, MOST_BLOCKS = 10, TABLES = 4 };

/* A code of at most LOOK bits has in `look` its symbol << 8 | its length, or, where the bits of its value lie within
   LOOK too, value << 16 | run << 8 | length of both; 0 stands for longer codes. */
typedef struct {
    uint8_t bits[LONGEST + 1], values[256]; /* as the file defines it: codes of each length, and their symbols */
    uint32_t look[1 << LOOK];
    uint32_t limit[LONGEST + 1]; /* first 16 bits that no code of this length or a shorter one begins */
    int offset[LONGEST + 1];     /* from a code of this length to its place in `values` */
} HuffmanTable;

typedef struct {
    const HuffmanTable *dc, *ac;
    int component;
} HuffmanBlock;

/* Bits of the data, which stop at a marker. */
typedef struct {
    uint64_t bits;     /* the next ones, from the top */
    int have, missing; /* valid bits, and how many of them stand behind the end of the data */
    const uint8_t *at, *end;
} HuffmanBits;

/* A scan that is being read. */
typedef struct HuffmanScan {
    HuffmanBits bits;
    int (*read_mcu)(struct HuffmanScan *scan, int16_t **blocks); /* huffman_mcu for this processor */
    int interval, left;       /* MCUs between restart markers (0: none), and until the next */
    int restarts, blocks;     /* markers passed; blocks in an MCU */
    int dc[4];                /* the last of each component */
    HuffmanBlock block[MOST_BLOCKS];
} HuffmanScan;

/* Where the coefficients of a scan's order belong; a damaged run may point up to 16 behind the last. */
static const uint8_t zigzag[64 + 16] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
                                        6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
                                        39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

/* A value of `size` bits, whose lower half stands for negative numbers. */
static inline int huffman_value(uint32_t bits, int size) { return bits >> (size - 1) ? (int)bits : (int)bits - (1 << size) + 1; }

static uint32_t huffman_entry(uint32_t first, int length, int symbol) {
    int size = symbol & 15, both = length + size;
    if (!size || both > LOOK) return (uint32_t)(symbol << 8 | length);
    int value = huffman_value(first >> (LOOK - both) & ((1u << size) - 1), size);
    return (uint32_t)value << 16 | (uint32_t)(symbol >> 4) << 8 | (uint32_t)both;
}

/* Nothing is done where the table is built already. The file's lengths must be those of a prefix code. */
static void huffman_build(HuffmanTable *table, const uint8_t bits[LONGEST + 1], const uint8_t values[256]) {
    if (!memcmp(table->bits, bits, sizeof table->bits) && !memcmp(table->values, values, sizeof table->values)) return;
    memcpy(table->bits, bits, sizeof table->bits), memcpy(table->values, values, sizeof table->values);
    memset(table->look, 0, sizeof table->look);
    uint32_t code = 0;
    int place = 0;
    for (int length = 1; length <= LONGEST; length++, code <<= 1) {
        table->offset[length] = place - (int)code;
        for (int i = 0; i < bits[length] && place < 256; i++, code++, place++)
            for (uint32_t j = 0; length <= LOOK && j < 1u << (LOOK - length); j++) {
                uint32_t first = (code << (LOOK - length)) + j;
                if (first < 1u << LOOK) table->look[first] = huffman_entry(first, length, values[place]);
            }
        table->limit[length] = code << (LONGEST - length);
    }
}

static void huffman_start(HuffmanScan *scan, const uint8_t *bytes, size_t size, int interval) {
    scan->bits = (HuffmanBits){0, 0, 0, bytes, bytes + size};
    scan->interval = scan->left = interval, scan->restarts = 0;
    memset(scan->dc, 0, sizeof scan->dc);
}

/* Zeros follow where a marker or the end comes. */
static __attribute__((noinline)) void huffman_fill_slowly(HuffmanBits *b) {
    for (; b->have <= 56; b->have += 8) {
        int is_data = b->at < b->end && (*b->at != 0xFF || (b->at + 1 < b->end && !b->at[1]));
        if (is_data) {
            b->bits |= (uint64_t)*b->at << (56 - b->have);
            b->at += 1 + (*b->at == 0xFF);
        } else {
            b->missing += 8;
        }
    }
}

#define HUFFMAN_INLINE static inline __attribute__((always_inline))

/* At least 32 bits, which a code and its value fit in. */
HUFFMAN_INLINE void huffman_fill(HuffmanBits *b) {
    uint64_t next;
    if (b->have >= 32) return;
    if (b->end - b->at >= 8) {
        memcpy(&next, b->at, 8);
        next = __builtin_bswap64(next);
        if (!(next & (~next - 0x0101010101010101u) & 0x8080808080808080u)) { /* no byte is 0xFF */
            b->bits |= next >> b->have;
            b->at += (63 - b->have) >> 3;
            b->have |= 56;
            return;
        }
    }
    HuffmanBits copy = *b; /* without an address of its own the reader stays in registers */
    huffman_fill_slowly(&copy);
    *b = copy;
}

HUFFMAN_INLINE uint32_t huffman_take(HuffmanBits *b, int count) {
    uint32_t taken = (uint32_t)(b->bits >> (64 - count));
    b->bits <<= count, b->have -= count;
    return taken;
}

/* The symbol of a code whose entry holds no value; -1 where there is none. */
HUFFMAN_INLINE int huffman_symbol(HuffmanBits *b, const HuffmanTable *table, uint32_t entry) {
    int length = entry & 255;
    if (length) {
        huffman_take(b, length);
        return entry >> 8 & 255;
    }
    uint32_t next = (uint32_t)(b->bits >> 48);
    for (length = LOOK + 1; length <= LONGEST; length++)
        if (next < table->limit[length]) return table->values[((int)huffman_take(b, length) + table->offset[length]) & 255];
    return -1;
}

/* The next difference of DC values; *valid is cleared where there is none. */
HUFFMAN_INLINE int huffman_difference(HuffmanBits *b, const HuffmanTable *table, int *valid) {
    huffman_fill(b);
    uint32_t entry = table->look[b->bits >> (64 - LOOK)];
    int value = (int32_t)entry >> 16;
    if (value) {
        huffman_take(b, entry & 255);
        return value;
    }
    int size = huffman_symbol(b, table, entry);
    *valid &= size >= 0 && size < 16;
    return size > 0 && size < 16 ? huffman_value(huffman_take(b, size), size) : 0;
}

/* The other coefficients of a block, which may be NULL; returns 0 where the data cannot be such. */
HUFFMAN_INLINE int huffman_block(HuffmanBits *b, const HuffmanTable *table, int16_t *block) {
    int k = 1;
    while (k < 64) {
        huffman_fill(b);
        uint32_t entry = table->look[b->bits >> (64 - LOOK)];
        int value = (int32_t)entry >> 16;
        if (value) {
            b->bits <<= entry & 63, b->have -= (int)(entry & 63);
            k += entry >> 8 & 255;
        } else {
            int symbol = huffman_symbol(b, table, entry), size = symbol & 15;
            if (symbol < 0) return 0;
            if (!size && symbol != 0xF0) break; /* the rest is zero */
            k += symbol >> 4;
            value = size ? huffman_value(huffman_take(b, size), size) : 0;
        }
        if (block) block[zigzag[k]] = (int16_t)value;
        k++;
    }
    return k <= 64;
}

/* Pass the restart marker that must be here. */
static int huffman_restart(HuffmanScan *scan) {
    const uint8_t *at = scan->bits.at, *end = scan->bits.end;
    int restarts = scan->restarts + 1;
    if (scan->bits.have - scan->bits.missing >= 8 || end - at < 2 || at[0] != 0xFF || at[1] != 0xD0 + (scan->restarts & 7)) return 0;
    huffman_start(scan, at + 2, (size_t)(end - at - 2), scan->interval);
    scan->restarts = restarts;
    return 1;
}

/* Read an MCU into blocks of zeros, 64 coefficients each, or pass over it where `blocks` is NULL; returns 0 where the data
   are not those of a sound scan. */
HUFFMAN_INLINE int huffman_mcu(HuffmanScan *scan, int16_t **blocks) {
    if (scan->interval && !scan->left && !huffman_restart(scan)) return 0;
    scan->left--;
    HuffmanBits bits = scan->bits;
    int valid = 1;
    for (int i = 0; i < scan->blocks && valid; i++) {
        const HuffmanBlock *b = &scan->block[i];
        int dc = scan->dc[b->component] += huffman_difference(&bits, b->dc, &valid);
        if (blocks) blocks[i][0] = (int16_t)dc;
        valid &= blocks ? huffman_block(&bits, b->ac, blocks[i]) : huffman_block(&bits, b->ac, NULL);
    }
    scan->bits = bits;
    return valid && bits.have >= bits.missing;
}

static int huffman_mcu_plain(HuffmanScan *scan, int16_t **blocks) { return huffman_mcu(scan, blocks); }

#if defined(__x86_64__)
/* Shifts by a variable count are a good part of the work and take less with BMI2. */
__attribute__((target("bmi2"))) static int huffman_mcu_bmi2(HuffmanScan *scan, int16_t **blocks) { return huffman_mcu(scan, blocks); }

static void huffman_choose(HuffmanScan *scan) { scan->read_mcu = cpu_has(CPU_BMI2) ? huffman_mcu_bmi2 : huffman_mcu_plain; }
#else
static void huffman_choose(HuffmanScan *scan) { scan->read_mcu = huffman_mcu_plain; }
#endif

#endif
