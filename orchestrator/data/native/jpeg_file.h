/* What a JPEG file says before its first compressed byte, and how to cut a window out of one with restart markers.

   ITU-T T.81: B.1.1 markers, B.2.2 frame header, F.1.1 restart intervals. */
#ifndef ORCHESTRATOR_JPEG_FILE_H
#define ORCHESTRATOR_JPEG_FILE_H

#include <stdint.h>
#include <string.h>

enum { JPEG_OK, JPEG_OTHER, JPEG_CUT }; /* CUT: the bytes end before the compressed data begin */
enum { SOF0 = 0xC0, SOF1 = 0xC1, SOF2 = 0xC2, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DRI = 0xDD,
       APP1 = 0xE1, APP14 = 0xEE };

typedef struct {
    int width, height, components, mcu_width, mcu_height;
    int baseline; /* one sequential scan of all components */
    int interval; /* MCUs between restart markers, 0 = none */
    size_t frame; /* offset of the frame header's height */
    size_t data;  /* offset of the first compressed byte */
} JpegFile;

static unsigned read16(const uint8_t *at) { return (unsigned)at[0] << 8 | at[1]; }

static unsigned read_any(const uint8_t *at, int bytes, int little) {
    unsigned value = 0;
    for (int i = 0; i < bytes; i++) value |= (unsigned)at[i] << 8 * (little ? i : bytes - 1 - i);
    return value;
}

/* Whether an APP1 segment asks for the image to be turned. */
static int is_turned(const uint8_t *segment, size_t length) {
    if (length > 29 && !memcmp(segment, "http://ns.adobe.com/xap/1.0/", 29)) {
        const uint8_t *found = memmem(segment, length, "tiff:Orientation", 16);
        return found && found + 19 < segment + length && found[17 + (found[17] == '"' || found[17] == '\'')] != '1';
    }
    if (length < 20 || memcmp(segment, "Exif\0\0", 6)) return 0;
    const uint8_t *tiff = segment + 6;
    size_t room = length - 6;
    int little = tiff[0] == 'I';
    size_t at = read_any(tiff + 4, 4, little);
    if (at + 2 > room) return 0;
    unsigned entries = read_any(tiff + at, 2, little);
    for (at += 2; entries-- && at + 12 <= room; at += 12)
        if (read_any(tiff + at, 2, little) == 0x0112) {
            unsigned turn = read_any(tiff + at + 8, 2, little);
            return turn >= 2 && turn <= 8;
        }
    return 0;
}

static int read_frame(JpegFile *file, const uint8_t *segment, size_t length, int marker) {
    if (length < 6 || segment[0] != 8) return JPEG_OTHER;
    file->height = (int)read16(segment + 1);
    file->width = (int)read16(segment + 3);
    file->components = segment[5];
    file->baseline = marker != SOF2;
    if (!file->width || !file->height || (file->components != 1 && file->components != 3) ||
        length < 6 + 3 * (size_t)file->components)
        return JPEG_OTHER;
    int across = 1, down = 1;
    for (int c = 0; c < file->components && file->components > 1; c++) {
        int sampling = segment[7 + 3 * c];
        across = sampling >> 4 > across ? sampling >> 4 : across;
        down = (sampling & 15) > down ? sampling & 15 : down;
    }
    file->mcu_width = 8 * across;
    file->mcu_height = 8 * down;
    return JPEG_OK;
}

static int jpeg_file_parse(JpegFile *file, const uint8_t *bytes, size_t size) {
    memset(file, 0, sizeof *file);
    if (size < 4) return JPEG_OTHER;
    if (bytes[0] != 0xFF || bytes[1] != SOI) return JPEG_OTHER;
    for (size_t at = 2; at + 4 <= size;) {
        if (bytes[at] != 0xFF) return JPEG_OTHER;
        int marker = bytes[at + 1];
        if (marker == 0xFF) {
            at++;
            continue;
        }
        size_t length = read16(bytes + at + 2);
        const uint8_t *segment = bytes + at + 4;
        if (length < 2 || marker < SOF0 || (marker >= RST0 && marker <= EOI)) return JPEG_OTHER;
        if (at + 2 + length > size) return JPEG_CUT;
        length -= 2;
        if (marker == SOF0 || marker == SOF1 || marker == SOF2) {
            if (file->width || read_frame(file, segment, length, marker) != JPEG_OK) return JPEG_OTHER;
            file->frame = at + 5;
        } else if (marker == DRI && length >= 2) {
            file->interval = (int)read16(segment);
        } else if (marker == APP1) {
            if (is_turned(segment, length)) return JPEG_OTHER;
        } else if (marker == SOS) {
            if (!file->width || !length) return JPEG_OTHER;
            file->baseline &= segment[0] == file->components;
            file->data = at + 4 + length;
            return JPEG_OK;
        } else if (marker > SOF2 && marker < 0xD0 && marker != DHT) {
            return JPEG_OTHER; /* lossless, hierarchical, arithmetic */
        }
        at += 4 + length;
    }
    return JPEG_CUT;
}

/* Whether the file ends as a JPEG does; some writers pad with a few bytes. */
static int jpeg_file_is_whole(const uint8_t *bytes, size_t size) {
    size_t last = size > 66 ? size - 66 : 0;
    for (size_t at = size; at-- > last + 1;)
        if (bytes[at] == EOI && bytes[at - 1] == 0xFF) return 1;
    return 0;
}

/* Whole restart intervals that cover a region: MCU columns and rows, and the pixels they stand for. */
typedef struct {
    int first_column, last_column, first_row, last_row; /* of MCUs, last excluded */
    int left, top, width, height;
} Window;

static Window jpeg_file_window(const JpegFile *file, int left, int top, int right, int bottom) {
    int columns = (file->width + file->mcu_width - 1) / file->mcu_width;
    int rows = (file->height + file->mcu_height - 1) / file->mcu_height;
    int step = file->mcu_width * file->interval;
    left = left < 0 ? 0 : left;
    top = top < 0 ? 0 : top;
    Window w;
    w.first_column = left / step * file->interval;
    w.last_column = (right + step - 1) / step * file->interval;
    w.last_column = w.last_column > columns ? columns : w.last_column;
    w.first_row = top / file->mcu_height;
    w.last_row = (bottom + file->mcu_height - 1) / file->mcu_height;
    w.last_row = w.last_row > rows ? rows : w.last_row;
    w.left = w.first_column * file->mcu_width;
    w.top = w.first_row * file->mcu_height;
    int end = w.last_column * file->mcu_width, floor_ = w.last_row * file->mcu_height;
    w.width = (end > file->width ? file->width : end) - w.left;
    w.height = (floor_ > file->height ? file->height : floor_) - w.top;
    return w;
}

/* The next restart marker's offset from `at` on, or `size`. */
static size_t next_restart(const uint8_t *bytes, size_t at, size_t size) {
    while (at + 1 < size) {
        const uint8_t *found = memchr(bytes + at, 0xFF, size - 1 - at);
        if (!found) return size;
        if ((found[1] & 0xF8) == RST0) return (size_t)(found - bytes);
        at = (size_t)(found - bytes) + 1;
    }
    return size;
}

/* Write the window as a JPEG of its own: the file's header with another size, and the intervals joined under restart
   markers counted anew. `out` has room for size + 16 bytes. Returns the length, 0 where the file's intervals do not
   divide its rows, the window is no smaller, or the markers are not as they should be. */
static size_t jpeg_file_join(const JpegFile *file, const uint8_t *bytes, size_t size, const Window *window, uint8_t *out) {
    int columns = (file->width + file->mcu_width - 1) / file->mcu_width;
    if (!file->baseline || !file->interval || columns % file->interval) return 0;
    if (window->width == file->width && window->height == file->height) return 0;
    int per_row = columns / file->interval;
    int first = window->first_column / file->interval, last = window->last_column / file->interval;
    memcpy(out, bytes, file->data);
    out[file->frame] = (uint8_t)(window->height >> 8), out[file->frame + 1] = (uint8_t)window->height;
    out[file->frame + 2] = (uint8_t)(window->width >> 8), out[file->frame + 3] = (uint8_t)window->width;
    size_t length = file->data, at = file->data;
    int number = 0, written = 0, rows_done = 0;
    for (int row = 0; row < window->last_row; row++, rows_done++) {
        for (int i = 0; i < per_row; i++, number++) {
            int wanted = row >= window->first_row && i >= first && i < last;
            if (row == window->last_row - 1 && i >= last) break;
            size_t end = next_restart(bytes, at, size);
            int is_last = end == size;
            if (is_last) {
                if ((size_t)number + 1 < (size_t)per_row * (size_t)((file->height + file->mcu_height - 1) / file->mcu_height)) return 0;
            } else if ((bytes[end + 1] & 7) != (number & 7)) {
                return 0;
            }
            if (is_last) { /* up to the end of the image */
                end = size;
                while (end >= at + 2 && !(bytes[end - 2] == 0xFF && bytes[end - 1] == EOI)) end--;
                if (end < at + 2) return 0;
                end -= 2;
            }
            if (wanted) {
                if (written) {
                    out[length++] = 0xFF;
                    out[length++] = (uint8_t)(RST0 + ((written - 1) & 7));
                }
                memcpy(out + length, bytes + at, end - at);
                length += end - at;
                written++;
            }
            at = is_last ? size : end + 2;
        }
    }
    out[length++] = 0xFF;
    out[length++] = EOI;
    return length;
}

#endif
