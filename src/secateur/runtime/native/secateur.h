// The C interface of the native runtime: an encoder that is given float weights once, packs them, and runs ragged batches.
#pragma once
#include <stdint.h>

#define SEC_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sec_encoder sec_encoder;

// Whole numbers that rows are rounded to: the sign of x - shift, or floor(clip((x - shift) / alpha, low, high) + 1/2).
typedef struct {
    const float* shift;  // of each column, or null: 0
    float alpha;
    int32_t low, high, sign;
} sec_levels;

// A linear map y = W x + b; rows of `weight` are outputs. One that is binary has no weight, but words of signs (64 to a
// word, the first in the lowest bit, 1 is +1): y = scale (sign(W) levels(x)) + b.
typedef struct {
    const float* weight;    // out x in, or null
    const float* bias;      // out, or null
    const uint64_t* signs;  // out x words, or null
    const float* scale;     // out
    sec_levels levels;
    int32_t out, in;
} sec_map;

typedef struct {
    const float* gain;
    const float* shift;
    float epsilon;
} sec_norm;

// A layer. Norms, where there are some, follow the residual sums, or precede the blocks and leave the stream as it is. A
// block that is skipped is the identity, its norms included; a block without units still adds its output map's bias and
// is normalised.
typedef struct {
    int32_t heads, head_width, neurons;
    int32_t skip_attention, skip_feed_forward;
    float scaling;          // of the products of queries and keys
    const float* relative;  // heads x (2 reach + 1): added to scores by (key - query), or null
    sec_map qkv, out, up, down;
    sec_norm after_attention, after_feed_forward;
    // In place of `qkv`: maps that do not read the same rows, whose results may be rounded.
    int32_t split, rounded;
    sec_map parts[3];
    sec_levels operands[3], probabilities;
    float scores, context;  // what whole products of queries and keys, and of probabilities and values, are multiplied by
    sec_norm before_attention, before_feed_forward;
    sec_map gate;         // neurons x hidden: activated neurons are multiplied by it
    const float* rotary;  // longest x head_width: cosines, then sines by which queries and keys at a place are turned;
                          // read while the encoder runs; or null
    int32_t window;       // a query sees keys up to so many tokens away; -1: all
} sec_layer;

typedef struct {
    int32_t hidden, layers;
    int32_t activation;  // 1 GELU, 2 ReLU, 3 GELU by tanh
    int32_t precision;   // 0 fp32, 1 bf16, 2 int8
    int32_t tier;        // 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 AMX; -1 the best of this machine
    int32_t reach;       // of relative positions
    sec_norm last;       // behind the layers, or no gain
} sec_config;

// Tables of embeddings, rows of `width`, and the norm of their sum. `positions` and `types` may be null. Words are floats,
// or with a scale for each row bytes or words of signs.
typedef struct {
    const void* words;
    const float *positions, *types, *word_scale;
    int32_t word_bits;  // 32, 8 or 1
    int32_t vocabulary, places, kinds;  // rows of each, also where there is no table of positions
    int32_t width, offset;              // the first token's position
    sec_norm norm;
} sec_tables;

// How layers hand on fewer and fewer tokens: each example the best of its own, by the attention that they get, beside those
// at its ends. A share of 0 is for layers behind which nothing but these is read.
typedef struct {
    const double* shares;        // of each layer: how many of an example's tokens it hands on
    int32_t first, last;         // tokens at the ends that always stay
    int32_t queries;             // that score a long example
    int32_t by_value, diagonal;  // attention is weighted by the size of values; what a token pays to itself counts
    float beta;                  // weight of the layers before in a score
    int32_t every;               // all tokens come back, with their last states; else only each example's first one
} sec_dropping;

// The best tier that this build and this machine have.
SEC_API int32_t sec_best_tier(void);
// Null, with a reason in `why` (of `size` bytes), where the encoder cannot be made.
SEC_API sec_encoder* sec_open(const sec_config* config, const sec_layer* layers, char* why, int32_t size);
SEC_API void sec_close(sec_encoder* encoder);
SEC_API int32_t sec_tier(const sec_encoder* encoder);
SEC_API int64_t sec_bytes(const sec_encoder* encoder);
// Four numbers: maps; those of which only the weights that are not 0 are kept; blocks of 32 outputs and 64 inputs that are
// there; and how many there would be without zeros.
SEC_API void sec_storage(const sec_encoder* encoder, int64_t* found);
// x: tokens x width, of ids that lie one behind the other; `types` holds each token's, or is null where all are 0.
// 0, or what is out of range: 1 an id, 2 an example's length, 3 a type; or 4 where memory is short.
SEC_API int32_t sec_embed(sec_encoder* encoder, const sec_tables* tables, const int64_t* ids, const int64_t* types,
                          const int32_t* starts, int32_t examples, float* x, int32_t threads);
// x: embeddings in, hidden states out, tokens x hidden; example i has the tokens starts[i] to starts[i + 1].
// `dropping` may be null. 0, or 1 where memory is short. Several threads may run one encoder at a time.
SEC_API int32_t sec_run(sec_encoder* encoder, float* x, const int32_t* starts, int32_t examples, int32_t threads,
                        const sec_dropping* dropping);
// Packs a map beside the layers, in float32. Its number, or -1 where memory is short; not while the encoder runs.
SEC_API int32_t sec_add(sec_encoder* encoder, const sec_map* map);
// What such a map makes of rows: x is rows x in, `to` rows x out. 0, or 1 where memory is short.
SEC_API int32_t sec_apply(sec_encoder* encoder, int32_t number, const float* x, int32_t rows, float* to, int32_t threads);

#ifdef __cplusplus
}
#endif
