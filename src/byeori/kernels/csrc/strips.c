/* How attention.c cuts a forest into strips and tiles, and packs tensors into tiles and back.

   A strip is 32 rows of queries of one node; a token's heads that share a key head are neighbours. Its tiles of 32
   keys stay where the forest has them, so nothing is gathered along a path. d and e, the head sizes, are padded with
   zeros to multiples of 32. */

#include "tiles.c"

/* The arguments of a layer's attention. Tensors of queries are [n, heads, d or e], tensors of keys [tokens, groups, d
   or e]. nodes: for each node the start and end of its queries, the number of runs of its path, and the start and end
   of each. */
typedef struct {
    const int64_t *nodes;
    long count, tokens, heads, groups, d, e, window;
    float scale;
} Layer;

/* Rows [row, row + rows) of a node; `before` tokens of its path come before its first query. */
typedef struct { const int64_t *node; long row, rows, before; } Strip;

/* A tile with keys that a strip sees: the keys in [from, to) are on its path, at their row + shift. */
typedef struct { long tile, from, to, shift; } KeyTile;

static long strips_of(const Layer *layer, Strip *out) {
    long found = 0, each = layer->heads / layer->groups;
    const int64_t *node = layer->nodes;
    for (long i = 0; i < layer->count; i++, node += 3 + 2 * node[2]) {
        long length = 0, rows = (node[1] - node[0]) * each;
        for (long r = 0; r < node[2]; r++) length += node[4 + 2 * r] - node[3 + 2 * r];
        for (long row = 0; row < rows; row += SIDE, found++)
            if (out) out[found] = (Strip){node, row, smaller(SIDE, rows - row), length - (node[1] - node[0])};
    }
    return found;
}

/* The position of a strip's row on its path. */
static inline long place(const Layer *layer, const Strip *strip, long row) {
    return strip->before + (strip->row + row) / (layer->heads / layer->groups);
}

static long visible_tiles(const Layer *layer, const Strip *strip, KeyTile *out) {
    long found = 0, at = 0, first = place(layer, strip, 0), last = place(layer, strip, strip->rows - 1);
    for (long r = 0; r < strip->node[2]; r++) {
        long from = strip->node[3 + 2 * r], to = strip->node[4 + 2 * r], shift = at - from;
        long start = larger(from, first - layer->window + 1 - shift), stop = smaller(to, last + 1 - shift);
        for (long tile = start / SIDE; start < stop && tile <= (stop - 1) / SIDE; tile++, found++)
            if (out) out[found] = (KeyTile){tile, from, to, shift};
        at += to - from;
    }
    return found;
}

/* The columns [*from, *to) of a tile that the query at a position sees. */
static inline void seen(const Layer *layer, const KeyTile *at, long position, int *from, int *to) {
    long start = larger(at->from, position - layer->window + 1 - at->shift) - at->tile * SIDE;
    long stop = smaller(at->to, position + 1 - at->shift) - at->tile * SIDE;
    *from = smaller(larger(start, 0), SIDE), *to = smaller(larger(stop, 0), SIDE);
}

/* The offset of a strip's row in a tensor of queries. */
static inline long address(const Layer *layer, const Strip *strip, long group, long row, long size) {
    long each = layer->heads / layer->groups, at = strip->row + row;
    return ((strip->node[0] + at / each) * layer->heads + group * each + at % each) * size;
}

/* A strip's rows as A: [2, size / 32] tiles. */
static void rows_in(const Layer *layer, const Strip *strip, long group, const uint16_t *from, long size, uint16_t *to) {
    memset(to, 0, 2 * SIDE * up(size));
    for (long i = 0; i < strip->rows; i++)
        row_in(from + address(layer, strip, group, i, size), size, to + i / HALF * HALF * up(size) + i % HALF * SIDE);
}

static void rows_out(const Layer *layer, const Strip *strip, long group, const float *from, const float *factor,
                     long size, uint16_t *to) {
    for (long i = 0; i < strip->rows; i++) {
        uint16_t *row = to + address(layer, strip, group, i, size);
        const float *sums = from + i * up(size);
        float by = factor ? factor[i] : 1.0f;
        SIMD for (long k = 0; k < size; k++) row[k] = narrow_bf16(sums[k] * by);
    }
}

/* The same rows transposed, as A: [size / 16] tiles of 16 columns by the strip's 32 rows. */
static void rows_transposed(const uint16_t *rows, long size, uint16_t *to) {
    long wide = up(size) / SIDE;
    uint32_t pairs[HALF * HALF];
    for (long j = 0; j < 2 * wide; j++) {
        for (long p = 0; p < HALF; p++) {
            const uint16_t *one = rows + ((p / 8 * wide + j / 2) * HALF + p % 8 * 2) * SIDE + j % 2 * HALF;
            SIMD for (long k = 0; k < HALF; k++) pairs[p * HALF + k] = one[k] | (uint32_t)one[k + SIDE] << 16;
        }
        transpose_pairs(pairs, HALF, (uint32_t *)(to + j * TILE));
    }
}

/* Keys as B, columns by rows of 32 numbers: for each 32 keys [2, size / 32] tiles. */
static void keys_across(const Layer *layer, long group, const uint16_t *from, long size, uint16_t *to) {
    long stride = layer->groups * size;
#pragma omp for schedule(static)
    for (long tile = 0; tile < up(layer->tokens) / HALF; tile++)
        across(from + tile * HALF * stride + group * size, stride, layer->tokens - tile * HALF, size,
               to + tile * HALF * up(size));
}

/* Keys as B, rows by columns: for each 32 keys [size / 16] tiles. */
static void keys_along(const Layer *layer, long group, const uint16_t *from, long size, uint16_t *to) {
    long stride = layer->groups * size;
#pragma omp for schedule(static)
    for (long tile = 0; tile < up(layer->tokens) / SIDE; tile++)
        along(from + tile * SIDE * stride + group * size, stride, layer->tokens - tile * SIDE, size,
              to + tile * SIDE * up(size), TILE);
}
