// A whole decoder layer of the Llama family: norms, rotary positions, attention over KV rows, the
// gated activation, and the matrix products, which are torch's own.
#pragma once

#include <cstdint>

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
        if (places.segment_count) {
            auto* run = prompt_attention<T>({layer.dim, layer.dim, false});
            if (!run) return 1;
            if (const int status =
                    run(q, k, v, wide, places.segments, places.segment_count, tokens,
                        places.keys_before, places.values_before, layer.key_heads, group, stride,
                        stride, stride, scoring, threads))
                return status;
        }
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
