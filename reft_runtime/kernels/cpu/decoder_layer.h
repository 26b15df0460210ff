// A whole decoder layer of the Llama family: norms, rotary positions, attention over KV rows, the
// gated activation, and the matrix products, which are torch's own.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "decode_attention.h"
#include "prompt_attention.h"
#include "rows.h"

namespace {

using Handle = void*;  // torch's tensor, as its functions for compiled code know it

// Those functions (torch/csrc/inductor/aoti_torch/c/shim.h and shim_cpu.h); all return 0 on success.
struct TorchFunctions {
    int32_t (*from_blob)(void* data, int64_t dimensions, const int64_t* sizes,
                         const int64_t* strides, int64_t offset, int32_t dtype, int32_t device_type,
                         int32_t device_index, Handle* made);
    int32_t (*data_of)(Handle, void** data);
    int32_t (*drop)(Handle);
    int32_t (*linear)(Handle rows, Handle packed_weight, Handle* bias, const char* then,
                      const double** scalars, int64_t scalar_count, const char** algorithm,
                      Handle* made);
    int32_t (*attend)(Handle query, Handle key, Handle value, double dropout, int32_t causal,
                      Handle* mask, double* scale, Handle* made, Handle* log_sums);
    int32_t (*stride)(Handle, int64_t dimension, int64_t* stride);
    int32_t dtype, cpu;
};

// A linear layer with a packed weight; `bias` is null where there is none.
struct Linear {
    Handle weight, bias;
    int64_t in;
};

struct DecoderLayer {
    TorchFunctions torch;
    Linear qkv, o, gate_up, down;
    const void *first_norm, *second_norm;
    float first_epsilon, second_epsilon;
    int64_t width, heads, key_heads, dim, inner;
    int64_t window, chunk;
    float scale, softcap;
    const float* sinks;
};

// Where a step's tokens are kept; see `attend` and `attend_prompts`.
struct StepPlaces {
    const int64_t *single, *segments;
    int64_t singles, segment_count, keys_before, values_before;
};

constexpr int NO_PRODUCT = 3;  // torch could not compute a product

// The result of a product, until it goes out of scope.
template <typename T>
class Product {
  public:
    Product(const TorchFunctions& torch, const Linear& layer, const T* rows, int64_t count)
        : torch_(torch) {
        const int64_t sizes[] = {count, layer.in}, strides[] = {layer.in, 1};
        Handle given = nullptr, bias = layer.bias;
        if (torch.from_blob(const_cast<T*>(rows), 2, sizes, strides, 0, torch.dtype, torch.cpu, 0,
                            &given))
            return;
        void* data = nullptr;
        if (!torch.linear(given, layer.weight, bias ? &bias : nullptr, "none", nullptr, 0, nullptr,
                          &made_) &&
            !torch.data_of(made_, &data))
            numbers = static_cast<T*>(data);
        torch.drop(given);
    }
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;
    ~Product() {
        if (made_) torch_.drop(made_);
    }

    T* numbers = nullptr;  // null if it failed

  private:
    const TorchFunctions& torch_;
    Handle made_ = nullptr;
};

#ifdef __AMX_BF16__
constexpr bool TILES = true;  // torch's attention multiplies bfloat16 by the CPU's matrix tiles
#else
constexpr bool TILES = false;
#endif
constexpr int64_t TILES_FROM = 192;  // tokens of a prompt from which they are faster than ours

// Attention of a whole prompt from its first token on, by torch: for heads [tokens, heads, dim] of
// the rows of a product. Returns whether it could; if not, `out` means nothing.
template <typename T>
bool attend_by_torch(const DecoderLayer& layer, const T* query, const T* key, const T* value,
                     T* out, int64_t tokens, int64_t between) {
    const TorchFunctions& torch = layer.torch;
    const int64_t heads = layer.key_heads, group = layer.heads / heads, dim = layer.dim;
    // Key heads are the batch: the query heads of each share it, by a stride of 0.
    const int64_t sizes[] = {heads, group, tokens, dim};
    const int64_t own[] = {group * dim, dim, between, 1}, shared[] = {dim, 0, between, 1};
    Handle q = nullptr, k = nullptr, v = nullptr, made = nullptr, sums = nullptr;
    const auto seen = [&](const T* at, const int64_t* strides, Handle* to) {
        return !torch.from_blob(const_cast<T*>(at), 4, sizes, strides, 0, torch.dtype, torch.cpu, 0,
                                to);
    };
    double scale = layer.scale;
    void* data = nullptr;
    int64_t by[3] = {0, 0, 0};
    bool done = seen(query, own, &q) && seen(key, shared, &k) && seen(value, shared, &v) &&
                !torch.attend(q, k, v, 0.0, 1, nullptr, &scale, &made, &sums) &&
                !torch.data_of(made, &data);
    for (int64_t i = 0; i < 3; ++i) done = done && !torch.stride(made, i, by + i);
    for (int64_t t = 0; done && t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t g = 0; g < group; ++g)
                std::memcpy(out + ((t * heads + h) * group + g) * dim,
                            static_cast<const T*>(data) + h * by[0] + g * by[1] + t * by[2],
                            dim * sizeof(T));
    for (Handle handle : {q, k, v, made, sums})
        if (handle) torch.drop(handle);
    return done;
}

// `attend_prompts` for the segments of a step; long prompts by `attend_by_torch` where the CPU has
// tiles.
template <typename T>
int attend_segments(const DecoderLayer& layer, const StepPlaces& places, const Scoring& scoring,
                    const T* q, const T* k, const T* v, T* out, int64_t tokens, int64_t stride,
                    int threads) {
    const Widths widths{layer.dim, layer.dim, false};
    auto* run = prompt_attention<T>(widths);
    if (!run) return 1;
    const auto is_whole = [&](const int64_t* segment) {
        const int64_t token = segment[2], start = segment[3], length = segment[4];
        return TILES && sizeof(T) == 2 && !scoring.softcap && !scoring.sinks && start == 0 &&
               length >= TILES_FROM && scoring.first(length - 1) == 0 && token >= 0 &&
               token + length <= tokens && length <= segment[1];
    };
    std::vector<int64_t> others;
    try {
        others.reserve(5 * places.segment_count);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    for (int64_t i = 0; i < places.segment_count; ++i) {
        const int64_t* segment = places.segments + 5 * i;
        const int64_t token = segment[2];
        if (is_whole(segment) &&
            attend_by_torch(layer, q + token * stride, k + token * stride, v + token * stride,
                            out + token * layer.heads * layer.dim, segment[4], stride)) {
#pragma omp parallel for num_threads(threads)
            for (int64_t h = 0; h < layer.key_heads; ++h)
                store_head(segment, h, k, v, widths, places.keys_before, places.values_before,
                           stride, stride);
        } else {
            others.insert(others.end(), segment, segment + 5);
        }
    }
    if (others.empty()) return 0;
    return run(q, k, v, out, others.data(), static_cast<int64_t>(others.size()) / 5, tokens,
               places.keys_before, places.values_before, layer.key_heads,
               layer.heads / layer.key_heads, stride, stride, stride, scoring, threads);
}

// Computes the layer for `rows` into `out`, both [tokens, width]. Products are of `padded` rows, of
// which those beyond the tokens mean nothing; `room` holds width + max(heads * dim, inner) numbers
// for each of them. Returns 0, or the status of what failed: the rows are as they were.
template <typename T>
int decoder_layer(const DecoderLayer& layer, const T* rows, T* out, int64_t tokens, int64_t padded,
                  const T* cos, const T* sin, const StepPlaces& places, T* room, int threads) {
    const int64_t query = layer.heads * layer.dim, key = layer.key_heads * layer.dim;
    const int64_t stride = query + 2 * key, group = layer.heads / layer.key_heads;
    const int64_t first = places.singles;  // of the tokens that attend together
    T *normal = room, *wide = room + padded * layer.width;
    const Scoring scoring{layer.window, layer.chunk, layer.scale, layer.softcap, layer.sinks};

    rms_norm(rows, static_cast<const T*>(layer.first_norm), normal, tokens, layer.width,
             layer.first_epsilon, 0, threads);
    {
        const Product<T> all(layer.torch, layer.qkv, normal, padded);
        T* q = all.numbers;
        if (!q) return NO_PRODUCT;
        T *k = q + query, *v = k + key;
        rotate(q, k, cos, sin, tokens, layer.heads, layer.key_heads, layer.dim, stride, layer.dim,
               stride, layer.dim, threads);
        if (first)
            if (const int status =
                    attend(q, k, v, wide, places.single, first, places.keys_before,
                           places.values_before, layer.key_heads, group,
                           {layer.dim, layer.dim, false}, stride, stride, stride, scoring, threads))
                return status;
        if (places.segment_count)
            if (const int status = attend_segments(layer, places, scoring, q, k, v, wide, tokens,
                                                   stride, threads))
                return status;
    }
    {
        const Product<T> mixed(layer.torch, layer.o, wide, padded);
        if (!mixed.numbers) return NO_PRODUCT;
        add_rms_norm(rows, mixed.numbers, static_cast<const T*>(layer.second_norm), out, normal,
                     tokens, layer.width, layer.second_epsilon, threads);
    }
    {
        const Product<T> both(layer.torch, layer.gate_up, normal, padded);
        if (!both.numbers) return NO_PRODUCT;
        silu_mul(both.numbers, wide, tokens, layer.inner, threads);
    }
    const Product<T> more(layer.torch, layer.down, wide, padded);
    if (!more.numbers) return NO_PRODUCT;
    add_rows(out, more.numbers, tokens * layer.width, threads);
    return 0;
}

}  // namespace
