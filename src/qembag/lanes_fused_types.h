/* Types that the fused types of today's loops choose from. To be deleted with them. */
#ifndef QEMBAG_LANES_FUSED_TYPES_H
#define QEMBAG_LANES_FUSED_TYPES_H

#include <stdint.h>

#include "lanes.h"

/* A pointer's type says how the codes that it points at are packed. */
typedef struct { uint8_t byte; } codes_8bit;
typedef struct { uint8_t byte; } codes_4bit;
typedef struct { uint8_t byte; } codes_2bit;

/* What the loop of a call must be ready for. */
typedef struct { uint8_t byte; } plain_int32;
typedef struct { uint8_t byte; } plain_int64;
typedef struct { uint8_t byte; } weighted_int32;
typedef struct { uint8_t byte; } weighted_int64;
typedef struct { uint8_t byte; } any_kind;

/* The accumulators of one pass. Its type fixes their number at compile time, so they stay in registers. */
typedef struct { lanes group[1]; } block_1;
typedef struct { lanes group[2]; } block_2;
typedef struct { lanes group[3]; } block_3;
typedef struct { lanes group[4]; } block_4;
typedef struct { lanes group[5]; } block_5;
typedef struct { lanes group[6]; } block_6;
typedef struct { lanes group[7]; } block_7;
typedef struct { lanes group[8]; } block_8;
typedef struct { lanes group[12]; } block_12;
typedef struct { lanes group[16]; } block_16;

/* The same, of which quads are unpacked as such. */
typedef struct { lanes group[4]; } quads_4;
typedef struct { lanes group[5]; } quads_5;
typedef struct { lanes group[6]; } quads_6;
typedef struct { lanes group[7]; } quads_7;
typedef struct { lanes group[8]; } quads_8;
typedef struct { lanes group[12]; } quads_12;
typedef struct { lanes group[16]; } quads_16;

#endif
