# SPDX-License-Identifier: MIT
# Finding a place in a queue pair's layout table (fc_segment, fc_row) in closed form, by packet number or by step.
from libc.stdint cimport uint32_t, uint64_t

from flowcheck._formats cimport fc_row, fc_segment

cdef struct fc_table:
    const fc_segment *segments
    const fc_row *rows
    uint32_t segment_count

# Where a packet is: `packet` counts from the row's first one. The segment and the pass are kept as where they begin.
cdef struct fc_place:
    const fc_segment *segment
    const fc_row *row
    uint64_t passes             # whole passes through the segment before this one
    uint64_t psn                # packets of the queue pair before this pass
    uint64_t step               # of the row's message
    uint32_t packet

cdef inline bint fc_in_segment(const fc_segment *segment, uint64_t behind, uint64_t period) noexcept nogil:
    return period != 0 and (segment.repeats == 0 or behind / period < segment.repeats)

cdef inline void fc_set_pass(const fc_segment *segment, uint64_t passes, fc_place *place) noexcept nogil:
    place.segment = segment
    place.passes = passes
    place.psn = segment.first_psn + passes * segment.period_psn

cdef inline void fc_set_row(const fc_row *row, fc_place *place) noexcept nogil:
    place.row = row
    place.step = place.segment.first_step + place.passes * place.segment.period_steps + row.step

cdef inline bint fc_locate_position(const fc_table *table, uint64_t position, fc_place *place) noexcept nogil:
    """Find packet number `position` of the queue pair; False before or behind the layout.

    `place` on entry is where the last packet was, its `row` NULL if there was none: most packets are in the same row.
    """
    cdef uint64_t behind
    cdef uint32_t low, high, middle, index
    cdef const fc_segment *segment
    cdef const fc_row *row = place.row
    if row != NULL:
        behind = position - place.psn - row.psn  # wraps to a huge number if the packet lies before the row
        if behind < row.packets:
            place.packet = <uint32_t> behind
            return True
    for index in range(table.segment_count):
        segment = table.segments + index
        if position < segment.first_psn:
            return False
        behind = position - segment.first_psn
        if not fc_in_segment(segment, behind, segment.period_psn):
            continue
        fc_set_pass(segment, behind / segment.period_psn, place)
        behind %= segment.period_psn
        low, high = 0, segment.rows  # the last row that begins at or before the packet
        while high - low > 1:
            middle = (low + high) / 2
            if table.rows[segment.first_row + middle].psn <= behind:
                low = middle
            else:
                high = middle
        row = table.rows + segment.first_row + low
        if behind < row.psn or behind - row.psn >= row.packets:
            return False
        fc_set_row(row, place)
        place.packet = <uint32_t> (behind - row.psn)
        return True
    return False

cdef inline bint fc_locate_count(const fc_table *table, uint64_t count, bint by_step, fc_place *place) noexcept nogil:
    """Find the last message of this queue pair whose step, or whose number on the connection, is at most `count`.

    Packet 0; False if there is none in the segment that `count` lies in. `place` need not be set.
    """
    cdef uint64_t behind, begin, period
    cdef uint32_t low, high, middle, index
    cdef const fc_segment *segment
    cdef const fc_row *row
    for index in range(table.segment_count):
        segment = table.segments + index
        begin = segment.first_step if by_step else segment.first_message
        period = segment.period_steps if by_step else segment.period_messages
        if count < begin:
            return False
        behind = count - begin
        if not fc_in_segment(segment, behind, period):
            continue
        fc_set_pass(segment, behind / period, place)
        behind %= period
        low, high = 0, segment.rows
        while high - low > 1:
            middle = (low + high) / 2
            row = table.rows + segment.first_row + middle
            if (row.step if by_step else row.message) <= behind:
                low = middle
            else:
                high = middle
        row = table.rows + segment.first_row + low
        if (row.step if by_step else row.message) > behind:
            return False
        fc_set_row(row, place)
        place.packet = 0
        return True
    return False

cdef inline uint64_t fc_message(const fc_place *place) noexcept nogil:
    """Return the number, on the connection, of the message at a place."""
    return place.segment.first_message + place.passes * place.segment.period_messages + place.row.message

cdef inline uint64_t fc_position(const fc_place *place) noexcept nogil:
    """Return the number of the packet, in the queue pair, at a place."""
    return place.psn + place.row.psn + place.packet
