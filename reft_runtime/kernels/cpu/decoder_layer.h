// Whole decoder layers of the Llama family: norms, rotary positions, attention over KV rows, the
// gated activation, and the matrix products: torch's own, or `multiply`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "bfloat16_product.h"
#include "buffers.h"
#include "decode_attention.h"
#include "float_product.h"
#include "low_rank.h"
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

// A linear layer with a packed weight or, for `multiply`, a plain one. Those that it has not,
// and a bias that is not there, are null.
struct Linear {
    Handle weight, bias;
    const void *plain, *plain_bias;
    int64_t in, out;
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

constexpr int NO_PRODUCT = 3;    // torch could not compute a product
constexpr int NO_ATTENTION = 4;  // prompts of these heads are not attended for

// The result of a product, until it goes out of scope.
template <typename T>
class Product {
  public:
    Product(const TorchFunctions& torch, const Linear& layer, const T* rows, int64_t count,
            int threads)
        : torch_(torch) {
        if (layer.plain) {
            own_ = make_buffer<T>(count * layer.out);
            if (own_ && multiply(rows, count, static_cast<const T*>(layer.plain),
                                 static_cast<const T*>(layer.plain_bias), own_.get(), layer.in,
                                 layer.out, threads))
                numbers = own_.get();
            return;
        }
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
    Buffer<T> own_{nullptr, std::free};
};

// Rows of a step's products from `first` on, of which `tokens` mean something.
struct Block {
    int64_t first, rows, tokens;
};

// Makes the rows zero that mean nothing. They would not matter, but for widths that are no multiple
// of 32 torch's products of bfloat16 read the beginning of the next row, times zero: a NaN counts.
template <typename T>
void blank(T* rows, const Block& block, int64_t width) {
    std::memset(rows + block.tokens * width, 0, (block.rows - block.tokens) * width * sizeof(T));
}

constexpr int64_t BLOCK_GRAIN = 16;  // rows of blocks are a multiple of this

// Calls `compute(block, threads)` for so many blocks of the rows, and returns whether all of them
// could be computed. Each is computed by one thread: torch computes some products of many rows by
// one thread however many it may take, and a block stays in a core's cache from one product to the
// next. A single block is computed by all threads.
template <typename F>
bool in_blocks(int64_t tokens, int64_t padded, int64_t blocks, int threads, const F& compute) {
    if (blocks == 1) return compute(Block{0, padded, tokens}, threads);
    const int64_t grains = padded / BLOCK_GRAIN;
    bool done = true;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(&& : done)
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = i * grains / blocks * BLOCK_GRAIN;
        const int64_t stop = (i + 1) * grains / blocks * BLOCK_GRAIN;
        done = compute(Block{first, stop - first, std::min(tokens, stop) - first}, 1) && done;
    }
    return done;
}

// Computes the layer for `rows` into `out`, both [tokens, width]. Products are of `padded` rows, of
// which those beyond the tokens mean nothing, in so many `blocks`. `room` holds width + 2 * (heads
// + key_heads) * dim + inner numbers for each of them. Returns 0, or the status of what failed: the
// rows are as they were.
template <typename T>
int decoder_layer(const DecoderLayer& layer, const T* rows, T* out, int64_t tokens, int64_t padded,
                  int64_t blocks, const T* cos, const T* sin, const StepPlaces& places, T* room,
                  int threads) {
    const int64_t query = layer.heads * layer.dim, key = layer.key_heads * layer.dim;
    const int64_t stride = query + 2 * key, width = layer.width, inner = layer.inner;
    const Scoring scoring{layer.window, layer.chunk, layer.scale, layer.softcap, layer.sinks};
    T *normal = room, *q = normal + padded * width, *k = q + query, *v = k + key;
    T *mixed = q + padded * stride, *gated = mixed + padded * query;

    const auto project = [&](const Block& block, int threads) {
        T *from = normal + block.first * width, *to = q + block.first * stride;
        rms_norm(rows + block.first * width, static_cast<const T*>(layer.first_norm), from,
                 block.tokens, width, layer.first_epsilon, 0, 0, threads);
        blank(from, block, width);
        const Product<T> all(layer.torch, layer.qkv, from, block.rows, threads);
        if (!all.numbers) return false;
#pragma omp parallel for num_threads(threads) if (block.tokens * stride > SERIAL)
        for (int64_t t = 0; t < block.tokens; ++t)
            std::memcpy(to + t * stride, all.numbers + t * stride, stride * sizeof(T));
        rotate(to, to + query, cos + block.first * layer.dim, sin + block.first * layer.dim,
               block.tokens, layer.heads, layer.key_heads, layer.dim, stride, layer.dim, stride,
               layer.dim, threads);
        return true;
    };
    const auto finish = [&](const Block& block, int threads) {
        T *to = out + block.first * width, *from = normal + block.first * width;
        T *heads = mixed + block.first * query, *wide = gated + block.first * inner;
        blank(heads, block, query);
        blank(wide, block, inner);
        {
            const Product<T> more(layer.torch, layer.o, heads, block.rows, threads);
            if (!more.numbers) return false;
            add_rms_norm(rows + block.first * width, more.numbers,
                         static_cast<const T*>(layer.second_norm), to, from, block.tokens, width,
                         layer.second_epsilon, threads);
        }
        {
            const Product<T> both(layer.torch, layer.gate_up, from, block.rows, threads);
            if (!both.numbers) return false;
            silu_mul(both.numbers, wide, block.tokens, inner, threads);
        }
        const Product<T> more(layer.torch, layer.down, wide, block.rows, threads);
        if (!more.numbers) return false;
        add_rows(to, more.numbers, block.tokens * width, threads);
        return true;
    };

    if (!in_blocks(tokens, padded, blocks, threads, project)) return NO_PRODUCT;
    if (places.singles)
        if (const int status = attend(q, k, v, mixed, places.single, places.singles,
                                      places.keys_before, places.values_before, layer.key_heads,
                                      layer.heads / layer.key_heads, {layer.dim, layer.dim, false},
                                      stride, stride, stride, scoring, threads))
            return status;
    if (places.segment_count) {
        auto* attend_together = prompt_attention<T>({layer.dim, layer.dim, false});
        if (!attend_together) return NO_ATTENTION;
        if (const int status = attend_together(
                q, k, v, mixed, places.segments, places.segment_count, tokens, places.keys_before,
                places.values_before, layer.key_heads, layer.heads / layer.key_heads, stride,
                stride, stride, scoring, threads))
            return status;
    }
    return in_blocks(tokens, padded, blocks, threads, finish) ? 0 : NO_PRODUCT;
}

// The edits of one layer's output; see `edit_rows`.
struct LayerEdits {
    const Edit* edits;
    const float* strengths;
    int64_t count;
};

// Computes so many layers of one width, each from what the one before it gave, into `outs` [count,
// tokens, width]. `before` [count, 2] says where the keys and the values of each begin in a row,
// `edits` [count] what becomes of its output (null if no output is edited), and `room` is enough for
// any of them; all else is as for one.
template <typename T>
int decoder_layers(const DecoderLayer* const* layers, int64_t count, const T* rows, T* outs,
                   int64_t tokens, int64_t padded, int64_t blocks, const T* cos, const T* sin,
                   StepPlaces places, const int64_t* before, const LayerEdits* edits, T* room,
                   int threads) {
    for (int64_t i = 0; i < count; ++i) {
        places.keys_before = before[2 * i];
        places.values_before = before[2 * i + 1];
        if (const int status = decoder_layer(*layers[i], rows, outs, tokens, padded, blocks, cos,
                                             sin, places, room, threads))
            return status;
        if (edits)
            edit_rows(outs, edits[i].edits, edits[i].strengths, edits[i].count, layers[i]->width,
                      threads);
        rows = outs;
        outs += tokens * layers[i]->width;
    }
    return 0;
}

}  // namespace
