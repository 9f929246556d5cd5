/* What the machine's memory asks for: every cache line of every row read once, far enough ahead of its use, and
 * nothing else. No lookup that reads whole rows can be faster but by a better order of reading.
 *
 * Compiled for one ROW_BYTES. A row's first and last byte and one byte every 64 between them touch all its lines,
 * wherever it starts; a count of lines that depended on the row's address would be mispredicted. */
#include <stdint.h>

uint64_t read_rows(const uint8_t *rows, const int64_t *indices, int64_t count, int64_t ahead)
{
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        if (i + ahead < count) {
            const uint8_t *next = rows + indices[i + ahead] * ROW_BYTES;
#pragma GCC unroll 32
            for (int at = 0; at < ROW_BYTES; at += 64)
                __builtin_prefetch(next + at, 0, 2); /* the package's own hint */
            __builtin_prefetch(next + ROW_BYTES - 1, 0, 2);
        }
        const uint8_t *row = rows + indices[i] * ROW_BYTES;
#pragma GCC unroll 32
        for (int at = 0; at < ROW_BYTES; at += 64)
            sum += row[at];
        sum += row[ROW_BYTES - 1];
    }
    return sum;
}
