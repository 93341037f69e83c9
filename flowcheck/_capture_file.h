/* SPDX-License-Identifier: MIT
 *
 * Walks the frames of a mapped capture file, where they lie: classic pcap of either byte order and time unit, and
 * little-endian pcapng of one section and one interface; Ethernet. That is what recorders write. Whatever is not plainly
 * that, or damaged, is left to libpcap, which says what is wrong with it: FC_FILE_ODD.
 *
 * The file may change under the walk: every length is read once, checked against the size, then used.
 */
#ifndef FLOWCHECK_CAPTURE_FILE_H
#define FLOWCHECK_CAPTURE_FILE_H

#include <stdint.h>
#include <string.h>

enum { FC_FILE_END = 0, FC_FILE_FRAME = 1, FC_FILE_ODD = -1 };

enum {
    FC_LONGEST_FRAME = 262144,   /* what libpcap takes of Ethernet */
    FC_LONGEST_BLOCK = 16 << 20, /* and of a pcapng block */
    FC_LONGEST_SECTION = 1 << 20, /* and of a section header */
    FC_ETHERNET = 1,
    FC_BLOCK_INTERFACE = 1,
    FC_BLOCK_PACKET = 2,
    FC_BLOCK_SIMPLE = 3,
    FC_BLOCK_ENHANCED = 6,
    FC_OPTION_RESOLUTION = 9,
    FC_OPTION_OFFSET = 14,
};
#define FC_BLOCK_SECTION 0x0A0D0D0Au

struct fc_file {
    const uint8_t *data;
    uint64_t size;
    uint64_t at;       /* of the next record or block */
    uint32_t longest;  /* frame that the file may hold */
    uint32_t unit_ns;  /* of its time stamps */
    uint8_t pcapng;
    uint8_t swapped;
};

struct fc_file_frame {
    const uint8_t *data;
    uint32_t length; /* bytes in the file */
    uint32_t wire_length;
    uint64_t ns; /* since the epoch */
};

/* A word that is read exactly once, wherever it lies. */
static inline uint32_t fc_file_word(const struct fc_file *file, uint64_t at) {
    typedef struct {
        uint32_t value;
    } __attribute__((packed, may_alias)) unaligned;
    uint32_t word = ((const volatile unaligned *)(file->data + at))->value;
    return file->swapped ? __builtin_bswap32(word) : word;
}

/* The bytes of a whole pcapng block at `at`, 0 if there is none. */
static inline uint32_t fc_file_block(const struct fc_file *file, uint64_t at) {
    uint64_t left = file->size - at;
    if (left < 12)
        return 0;
    uint32_t length = fc_file_word(file, at + 4);
    if (length < 12 || length % 4 || length > FC_LONGEST_BLOCK || length > left)
        return 0;
    return fc_file_word(file, at + length - 4) == length ? length : 0;
}

/* The time unit that an interface's options give, 0 if it is none of ours. */
static inline uint32_t fc_file_unit(const struct fc_file *file, uint64_t at, uint64_t end) {
    uint32_t unit = 1000, seen = 0;
    while (at != end) {
        if (end - at < 4)
            return 0;
        uint32_t word = fc_file_word(file, at), code = word & 0xFFFF, length = word >> 16;
        uint64_t room = 4 + (((uint64_t)length + 3) & ~(uint64_t)3);
        if (room > end - at || code == FC_OPTION_OFFSET)
            return 0;
        if (code == 0)
            return length ? 0 : unit;
        if (code == FC_OPTION_RESOLUTION) {
            uint8_t power = length == 1 && !seen++ ? fc_file_word(file, at + 4) & 0xFF : 0;
            if (power != 6 && power != 9)
                return 0;
            unit = power == 6 ? 1000 : 1;
        }
        at += room;
    }
    return unit;
}

/* Begin to walk; whether the file may be a plain one. */
static inline int fc_file_begin(struct fc_file *file, const uint8_t *data, uint64_t size) {
    memset(file, 0, sizeof(*file));
    file->data = data;
    file->size = size;
    file->longest = FC_LONGEST_FRAME;
    if (size < 24)
        return 0;
    uint32_t magic = fc_file_word(file, 0), length, snap;
    if (magic == FC_BLOCK_SECTION) {
        file->pcapng = 1;
        length = fc_file_block(file, 0);
        if (length < 28 || length > FC_LONGEST_SECTION || fc_file_word(file, 8) != 0x1A2B3C4Du || fc_file_word(file, 12) != 1)
            return 0;
        file->at = length;
        length = fc_file_block(file, file->at);
        if (length < 20 || fc_file_word(file, file->at) != FC_BLOCK_INTERFACE ||
            (fc_file_word(file, file->at + 8) & 0xFFFF) != FC_ETHERNET)
            return 0;
        snap = fc_file_word(file, file->at + 12);
        file->unit_ns = fc_file_unit(file, file->at + 16, file->at + length - 4);
        file->at += length;
    } else {
        file->swapped = magic == 0xD4C3B2A1u || magic == 0x4D3CB2A1u;
        magic = fc_file_word(file, 0);
        file->unit_ns = magic == 0xA1B2C3D4u ? 1000 : magic == 0xA1B23C4Du ? 1 : 0;
        uint32_t version = fc_file_word(file, 4);
        if (version != (file->swapped ? 2u << 16 | 4 : 4u << 16 | 2) || fc_file_word(file, 20) != FC_ETHERNET)
            return 0;
        snap = fc_file_word(file, 16);
        file->at = 24;
    }
    if (snap && snap < file->longest)
        file->longest = snap;
    return file->unit_ns != 0;
}

static inline int fc_file_next_record(struct fc_file *file, struct fc_file_frame *frame) {
    uint64_t left = file->size - file->at;
    if (left == 0)
        return FC_FILE_END;
    if (left < 16)
        return FC_FILE_ODD;
    uint32_t seconds = fc_file_word(file, file->at), parts = fc_file_word(file, file->at + 4);
    frame->length = fc_file_word(file, file->at + 8);
    frame->wire_length = fc_file_word(file, file->at + 12);
    frame->data = file->data + file->at + 16;
    frame->ns = (uint64_t)seconds * 1000000000 + (uint64_t)parts * file->unit_ns;
    if (frame->length > file->longest || frame->length > left - 16 || seconds >> 31 || parts >= 1000000000 / file->unit_ns)
        return FC_FILE_ODD;
    file->at += 16 + frame->length;
    return FC_FILE_FRAME;
}

static inline int fc_file_next_block(struct fc_file *file, struct fc_file_frame *frame) {
    while (file->at != file->size) {
        uint64_t at = file->at;
        uint32_t length = fc_file_block(file, at);
        if (length == 0)
            return FC_FILE_ODD;
        file->at += length;
        switch (fc_file_word(file, at)) {
        case FC_BLOCK_ENHANCED:
            break;
        case FC_BLOCK_SECTION:
        case FC_BLOCK_INTERFACE:
        case FC_BLOCK_PACKET:
        case FC_BLOCK_SIMPLE:
            return FC_FILE_ODD;
        default:
            continue; /* statistics, names, what somebody else put there */
        }
        if (length < 32)
            return FC_FILE_ODD;
        uint64_t time = (uint64_t)fc_file_word(file, at + 12) << 32 | fc_file_word(file, at + 16);
        frame->length = fc_file_word(file, at + 20);
        frame->wire_length = fc_file_word(file, at + 24);
        frame->data = file->data + at + 28;
        frame->ns = time * file->unit_ns;
        if (fc_file_word(file, at + 8) != 0 || frame->length > file->longest || frame->length > length - 32 ||
            time > INT64_MAX / file->unit_ns)
            return FC_FILE_ODD;
        return FC_FILE_FRAME;
    }
    return FC_FILE_END;
}

/* Take the next frame: FC_FILE_FRAME, FC_FILE_END, or FC_FILE_ODD. */
static inline int fc_file_next(struct fc_file *file, struct fc_file_frame *frame) {
    return file->pcapng ? fc_file_next_block(file, frame) : fc_file_next_record(file, frame);
}

#endif
