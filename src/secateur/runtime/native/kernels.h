// What a tier of instructions provides. Tiers are compiled with flags of their own: nothing of the standard library that
// a linker could merge is used in them.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace secateur {

enum Precision : int { FP32 = 0, BF16 = 1, INT8 = 2, BINARY = 3 };
enum Activation : int { NONE = 0, GELU = 1, RELU = 2, GELU_TANH = 3 };

constexpr int WIDE = 32;    // outputs of a panel, what outputs are padded to
constexpr int DEPTH = 64;   // inputs of a block of a panel, what inputs are padded to
constexpr int BAND = 32;   // what rows of buffers are padded to
constexpr int SLACK = 256;  // bytes that may be read beyond a buffer
constexpr int EVERY = INT32_MAX;  // as a number of an example's tokens: no limit
constexpr int SHORT = 4;    // texts of up to so many times the queries that score are scored by all of theirs

static inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline int least(int a, int b) { return a < b ? a : b; }
static inline int most(int a, int b) { return a > b ? a : b; }

// Whole numbers that a row is rounded to: the sign of x - shift, else floor(clip((x - shift) / alpha, low, high) + 1/2).
struct Levels {
    float alpha = 1, inverse = 1;  // and 1 / alpha
    const float* shift = nullptr;  // of each column, or null: 0
    int low = 0, high = 0;
    bool sign = false;
    // Of two levels behind an activation, or null: the upper one is reached by sums up to `below` and from `above` on.
    const float *below = nullptr, *above = nullptr;
};

// A packed linear map. Outputs beyond `out` have weight and bias 0; binary ones are given rows that are 0 beyond `in`.
struct Map {
    Precision precision = FP32;
    Levels levels;                    // of the rows that a binary map is given
    int out = 0, in = 0;              // as given
    int wide = 0, deep = 0;           // padded
    // Panels of WIDE outputs, of which those blocks of DEPTH inputs are there that are not all 0: panel p has blocks[p] to
    // blocks[p + 1], and steps[b] is where the inputs of block b begin, in blocks.
    int32_t *blocks = nullptr, *steps = nullptr;
    void* weights = nullptr;          // panel after panel, in the order of the tier
    // Null, or of each 64 bytes of weights which are not 0: only these are kept, panel p's from values[p] on.
    uint64_t* masks = nullptr;
    size_t* values = nullptr;
    float* bias = nullptr;            // wide
    float* scale = nullptr;           // wide: of int8 weights, or of a binary map's whole products
    int32_t* sums = nullptr;          // wide: of int8 or binary weights
};

// Rows of intermediate results: floats, or their upper halves (bfloat16) where products are not in fp32. Those of a binary
// map may be rounded at once: to `levels`, or as another binary map reads its rows.
struct Rows {
    void* data;
    int stride;  // entries
    bool half;
    const Levels* levels = nullptr;
    const Map* next = nullptr;
};

// Attention on levels: rows hold whole numbers.
struct AttentionLevels {
    Levels probabilities;
    float scores, context;  // what whole products of queries and keys, and of probabilities and values, are multiplied by
};

struct Attention {
    int heads, width, examples, reach;
    float scaling;
    const float* relative;
    const int32_t* starts;
    float* scratch;         // of every thread
    size_t scratch_each;    // floats
    const int32_t* places;  // of each token in its example, ascending; null: its index there
    const float* rotary;    // places x width: cosines, then sines of half the width each; or null
    int window;             // keys further away than this are not seen; -1: all are
    // How much attention each token gets, summed over the queries that score: heads x stride, or null. Of levels, how many.
    double* scores;
    int score_stride, queries;
    bool by_value, diagonal;  // weighted by the size of its value; with what it pays to itself
    const AttentionLevels* levels;  // null: rows are floats
    int queries_read;               // of each example, the first ones: no context is wanted for others
};

typedef void (*Job)(void* what, int thread);

// The threads of a pass.
struct Team {
    int threads;
    // Calls the job in this thread, as number 0, and in those others that come in time; ends when all of these have ended.
    void (*share)(Team& team, Job job, void* what);
};

struct Kernels {
    const char* name;
    bool halves;  // attention is given levels as bfloat16
    bool masks;   // products read bytes of which only those that are not 0 are kept
    size_t (*attention_scratch)(int width, int tokens);  // floats that one thread needs
    void (*pack)(Precision precision, const float* weight, Map& map);
    void (*pack_signs)(const uint64_t* words, Map& map);  // rows of words, the first sign in the lowest bit
    // Rows as a product reads them: `input` has rows x map.deep entries of the precision, `scale` one for each row.
    void (*prepare)(Precision precision, Rows from, int rows, const Map& map, void* input, float* scale, Team& team);
    // `panels`: 2 x WIDE x map.deep bytes for each thread, where weights are spread out that are kept in fewer.
    void (*product)(Precision precision, const void* input, const float* scale, int rows, const Map& map,
                    Activation activation, Rows to, void* panels, Team& team);
    // qkv: queries, keys and values side by side, each heads x width.
    void (*attention)(Rows qkv, const Attention& what, Rows to, Team& team);
    // x = norm(x + y), or x + bias where there is no y.
    void (*add_norm)(float* x, const Rows* y, const float* bias, int rows, int hidden, const float* gain,
                     const float* shift, float epsilon, Team& team);
    // x += y, or x += bias where there is no y.
    void (*add)(float* x, const Rows* y, const float* bias, int rows, int hidden, Team& team);
    // to = norm(x).
    void (*norm)(float* x, int rows, int hidden, const float* gain, const float* shift, float epsilon, float* to,
                 Team& team);
    // Turns queries and keys by the angles of their places, in place.
    void (*rotate)(Rows qkv, const Attention& what, Team& team);
    // x *= by, the first `count` entries of each row.
    void (*multiply)(Rows x, Rows by, int rows, int count, Team& team);
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels, avx512_kernels, amx_kernels;  // where the build has them: SEC_AVX2 and so on

}  // namespace secateur
