// Fused small operators of a decoder step on a CPU: each is one pass over memory, where torch makes
// several passes with a dispatch each. Compiled at first use (build.py); plain C++17 and OpenMP,
// vectorised by the compiler. Every function takes the number of threads to use. Arithmetic is in
// float32, rounded once to the tensor's own type (but see norm_row).

#include <cstdint>

#include "bfloat16_product.h"
#include "convolution.h"
#include "decode_attention.h"
#include "decoder_layer.h"
#include "delta_rule.h"
#include "float_product.h"
#include "gated_delta_net.h"
#include "low_rank.h"
#include "prompt_attention.h"
#include "rows.h"
#include "sampling.h"
#include "scalars.h"

#define EXPORT(NAME, T)                                                                            \
    extern "C" void rms_norm_##NAME(const T* x, const T* weight, T* out, int64_t rows,             \
                                    int64_t width, float epsilon, int once, int from_one,          \
                                    int threads) {                                                 \
        rms_norm(x, weight, out, rows, width, epsilon, once, from_one, threads);                   \
    }                                                                                              \
    extern "C" void gated_rms_norm_##NAME(const T* x, const T* gate, const T* weight, T* out,      \
                                          int64_t rows, int64_t width, float epsilon, int once,    \
                                          int threads) {                                           \
        gated_rms_norm(x, gate, weight, out, rows, width, epsilon, once, threads);                 \
    }                                                                                              \
    extern "C" void add_rms_norm_##NAME(const T* x, const T* more, const T* weight, T* total,      \
                                        T* out, int64_t rows, int64_t width, float epsilon,        \
                                        int threads) {                                             \
        add_rms_norm(x, more, weight, total, out, rows, width, epsilon, threads);                  \
    }                                                                                              \
    extern "C" void silu_mul_##NAME(const T* both, T* out, int64_t rows, int64_t width,            \
                                    int threads) {                                                 \
        silu_mul(both, out, rows, width, threads);                                                 \
    }                                                                                              \
    extern "C" void pick_##NAME(const T* logits, const Picking* rows, int64_t* tokens,             \
                                float* values, int64_t* ids, int64_t most, char* rooms,            \
                                int64_t count, int64_t width, int threads) {                       \
        pick(logits, rows, tokens, values, ids, most, rooms, count, width, threads);               \
    }                                                                                              \
    extern "C" void rotate_##NAME(T* query, T* key, const T* cos, const T* sin, int64_t tokens,    \
                                  int64_t query_heads, int64_t key_heads, int64_t width,           \
                                  int64_t query_stride, int64_t query_between,                     \
                                  int64_t key_stride, int64_t key_between, int threads) {          \
        rotate(query, key, cos, sin, tokens, query_heads, key_heads, width, query_stride,          \
               query_between, key_stride, key_between, threads);                                   \
    }                                                                                              \
    extern "C" void delta_rule_##NAME(                                                             \
        const T* query, const T* key, const T* value, const float* gate, const float* beta,        \
        float* state, T* out, int64_t count, int64_t tokens, int64_t key_heads,                    \
        int64_t value_heads, int64_t key_dim, int64_t value_dim, int64_t query_stride,             \
        int64_t key_stride, int64_t value_stride, int normal, int threads) {                       \
        delta_rule(query, key, value, gate, beta, state, out, count, tokens, key_heads,            \
                   value_heads, key_dim, value_dim, query_stride, key_stride, value_stride,        \
                   normal, threads);                                                               \
    }                                                                                              \
    extern "C" void convolve_##NAME(const T* inputs, const T* weight, const T* bias, T* state,     \
                                    T* out, int64_t count, int64_t tokens, int64_t channels,       \
                                    int64_t stride, int64_t taps, int64_t kept, int silu,          \
                                    int threads) {                                                 \
        convolve<T>(inputs, {weight, bias, taps, kept, silu != 0}, state, out, count, tokens,      \
                    channels, stride, threads);                                                    \
    }                                                                                              \
    extern "C" void gated_delta_net_##NAME(                                                        \
        const T* rows, const T* weight, const float* decay_rate, const float* time_bias,           \
        const T* norm, T* inputs, float* state, T* mixed, T* out,                                  \
        int64_t count, int64_t tokens, int64_t stride, int64_t taps, int64_t kept,                 \
        int64_t key_heads, int64_t key_dim, int64_t value_heads, int64_t value_dim,                \
        float epsilon, int threads) {                                                              \
        gated_delta_net<T>(rows, {key_heads, key_dim, value_heads, value_dim},                     \
                           {{weight, nullptr, taps, kept, true}, decay_rate, time_bias, norm,      \
                            epsilon},                                                              \
                           inputs, state, mixed, out, count, tokens, stride, threads);             \
    }                                                                                              \
    extern "C" void edit_rows_##NAME(T* hidden, const int64_t* edits, const float* strengths,      \
                                     int64_t count, int64_t width, int threads) {                  \
        edit_rows(hidden, reinterpret_cast<const Edit*>(edits), strengths, count, width, threads); \
    }                                                                                              \
    extern "C" int attend_##NAME(                                                                  \
        const T* query, const T* key, const T* value, T* out, const int64_t* places,               \
        int64_t count, int64_t, int64_t keys_before, int64_t values_before, int64_t key_heads,     \
        int64_t group, int64_t key_dim, int64_t value_dim, int64_t query_stride,                   \
        int64_t key_stride, int64_t value_stride, int64_t window, int64_t chunk, float scale,      \
        float softcap, const float* sinks, int threads) {                                          \
        return attend(query, key, value, out, places, count, keys_before, values_before,           \
                      key_heads, group, {key_dim, value_dim, keys_before == values_before},        \
                      query_stride, key_stride, value_stride,                                      \
                      {window, chunk, scale, softcap, sinks}, threads);                            \
    }                                                                                              \
    extern "C" int attend_prompts_##NAME(                                                          \
        const T* query, const T* key, const T* value, T* out, const int64_t* segments,             \
        int64_t count, int64_t tokens, int64_t keys_before, int64_t values_before,                 \
        int64_t key_heads, int64_t group, int64_t key_dim, int64_t value_dim,                      \
        int64_t query_stride, int64_t key_stride, int64_t value_stride, int64_t window,            \
        int64_t chunk, float scale, float softcap, const float* sinks, int threads) {              \
        auto* run = prompt_attention<T>({key_dim, value_dim, keys_before == values_before});       \
        if (!run) return 1;                                                                        \
        return run(query, key, value, out, segments, count, tokens, keys_before, values_before,    \
                   key_heads, group, query_stride, key_stride, value_stride,                       \
                   {window, chunk, scale, softcap, sinks}, threads);                               \
    }                                                                                              \
    extern "C" int multiply_##NAME(const T* rows, int64_t count, const T* weight, const T* bias,   \
                                   T* out, int64_t in, int64_t outs, int threads) {                \
        return !multiply(rows, count, weight, bias, out, in, outs, threads);                       \
    }                                                                                              \
    extern "C" int attend_layers_##NAME(                                                           \
        const DecoderLayer* const* layers, int64_t count, const T* rows, T* outs, int64_t tokens,  \
        int64_t padded, int64_t blocks, const T* cos, const T* sin, const int64_t* single,         \
        int64_t singles, const int64_t* segments, int64_t segment_count, const int64_t* before,    \
        const LayerEdits* edits, T* room, int threads) {                                           \
        const StepPlaces places{single, segments, singles, segment_count, 0, 0};                   \
        return decoder_layers(layers, count, rows, outs, tokens, padded, blocks, cos, sin, places, \
                              before, edits, room, threads);                                       \
    }

// Whether attention takes heads of these widths. All operators take the dtypes that are exported
// below.
extern "C" int can_attend(int64_t key_dim, int64_t value_dim) {
    return attends(key_dim, value_dim);
}
extern "C" int can_attend_prompts(int64_t key_dim, int64_t value_dim, int values_in_keys) {
    return attends_prompts({key_dim, value_dim, values_in_keys != 0});
}
// Whether `multiply_*` compute anything here.
extern "C" int can_multiply() { return have_tiles(); }
// Bytes that `pick` needs for each thread.
extern "C" int64_t picking_room(int64_t width) { return Room::bytes(width); }

// The widest rows that are edited, and the largest rank of an edit.
extern "C" int64_t widest_edited() { return MAX_EDITED; }
extern "C" int64_t largest_rank() { return MAX_RANK; }

// The widest key heads that the gated delta rule takes.
extern "C" int64_t widest_delta_key() { return MAX_KEY; }

// The widest value heads that the whole gated delta net takes.
extern "C" int64_t widest_delta_value() { return MAX_VALUE; }

// The most taps of convolutions.
extern "C" int64_t most_taps() { return MAX_TAPS; }

// The vector instructions that the compiler was allowed to use.
extern "C" const char* instructions() {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "plain";
#endif
}

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
