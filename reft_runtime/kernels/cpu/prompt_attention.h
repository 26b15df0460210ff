// Attention of prompts: queries of many tokens go over the keys together, as products of tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "decode_attention.h"
#include "tile_attention.h"
#include "vectors.h"

namespace {

// Sixteen floats, in as many registers as that takes; arithmetic on them is element by element.
typedef float lanes __attribute__((vector_size(64)));
constexpr int64_t ROWS = 4;   // rows of a product that are computed at once
constexpr int64_t TILE = 48;  // query heads times tokens that go over the keys together, at most

// c [rows, N] = a [rows, DEPTH] b [DEPTH, N], or c += with `add`. `rows` is a multiple of ROWS, N
// one of LANES. A_ROW and A_DEPTH are the strides of a, B_DEPTH that of b.
template <int64_t DEPTH, int64_t N, int64_t A_ROW, int64_t A_DEPTH, int64_t B_DEPTH>
void multiply(const float* a, const float* b, float* c, int64_t rows, bool add) {
#ifdef __AVX512F__
    constexpr int64_t WIDE = N % 64 == 0 ? 4 : N % 48 == 0 ? 3 : N % 32 == 0 ? 2 : 1;
#else
    constexpr int64_t WIDE = 1;
#endif
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t column = 0; column < N; column += WIDE * LANES) {
            float* to = c + row * N + column;
            lanes sums[ROWS][WIDE], right[WIDE];
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int64_t w = 0; w < WIDE; ++w)
                    if (add)
                        std::memcpy(&sums[r][w], to + r * N + w * LANES, sizeof(lanes));
                    else
                        sums[r][w] = lanes{};
            for (int64_t k = 0; k < DEPTH; ++k) {
#pragma GCC unroll 4
                for (int64_t w = 0; w < WIDE; ++w)
                    std::memcpy(&right[w], b + k * B_DEPTH + column + w * LANES, sizeof(lanes));
#pragma GCC unroll 4
                for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                    for (int64_t w = 0; w < WIDE; ++w)
                        sums[r][w] += a[(row + r) * A_ROW + k * A_DEPTH] * right[w];
            }
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int64_t w = 0; w < WIDE; ++w)
                    std::memcpy(to + r * N + w * LANES, &sums[r][w], sizeof(lanes));
        }
}

// BLOCK rows as floats; those from `count` on are zero, whatever lies there.
template <int64_t DIM, typename T>
const float* widen_block(const T* from, float* scratch, int64_t count) {
    if constexpr (std::is_same_v<T, float>)
        if (count == BLOCK) return from;
    for (int64_t i = 0; i < count * DIM; ++i) scratch[i] = load(from[i]);
    for (int64_t i = count * DIM; i < BLOCK * DIM; ++i) scratch[i] = 0;
    return scratch;
}

// Attention of the tokens of one prompt from `position` on, for `group` query heads that share a
// key head; `sinks` are those of these heads. Scores have a row per key and TILE columns (token,
// head). With INSIDE, the values are the first numbers of the keys.
template <typename T, int64_t DIM, int64_t WIDTH, bool INSIDE>
void attend_tile(const T* query, const T* keys, const T* values, T* out, int64_t tokens,
                 int64_t group, int64_t query_stride, int64_t out_stride, int64_t position,
                 const Scoring& scoring, const float* sinks) {
    constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    alignas(64) float queries[DIM * TILE], scores[BLOCK * TILE], sums[TILE * WIDTH];
    alignas(64) float key_scratch[BLOCK * DIM], value_scratch[INSIDE ? 1 : BLOCK * WIDTH];
    alignas(64) float largest[TILE], top[TILE], shrink[TILE], weights[TILE];
    const int64_t used = tokens * group, window = scoring.window, chunk = scoring.chunk;
    std::fill_n(queries, DIM * TILE, 0.0f);
    std::fill_n(sums, TILE * WIDTH, 0.0f);
    std::fill_n(largest, TILE, NOTHING);
    std::fill_n(weights, TILE, 0.0f);
    for (int64_t c = 0; c < used; ++c) {
        const T* from = query + c / group * query_stride + c % group * DIM;
        for (int64_t i = 0; i < DIM; ++i) queries[i * TILE + c] = load(from[i]) * scoring.scale;
        if (sinks) largest[c] = sinks[c % group], weights[c] = 1;
    }
    const int64_t first = scoring.first(position);
    const int64_t last = position + tokens - 1;
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        const float* k = widen_block<DIM>(keys + start * DIM, key_scratch, count);
        const float* v = k;
        if constexpr (!INSIDE)
            v = widen_block<WIDTH>(values + start * WIDTH, value_scratch, count);
        multiply<DIM, TILE, DIM, 1, TILE>(k, queries, scores, BLOCK, false);
        if (scoring.softcap)
            for (int64_t i = 0; i < BLOCK * TILE; ++i)
                scores[i] = capped(scores[i], scoring.softcap);
        // Key start + j is seen by the tokens from its own position on: `window` of them, and those
        // of its chunk.
        for (int64_t j = 0; j < BLOCK; ++j) {
            const int64_t at = start + j;
            int64_t beyond = window ? at + window : position + TILE;
            if (chunk) beyond = std::min(beyond, at - at % chunk + chunk);
            const int64_t from = std::clamp<int64_t>((at - position) * group, 0, TILE);
            const int64_t to = std::clamp<int64_t>((beyond - position) * group, 0, TILE);
            std::fill_n(scores + j * TILE, j < count ? from : TILE, NOTHING);
            std::fill_n(scores + j * TILE + to, TILE - to, NOTHING);
        }
        std::copy_n(largest, TILE, top);
        for (int64_t j = 0; j < BLOCK; ++j)
            for (int64_t c = 0; c < TILE; ++c) {
                const float score = scores[j * TILE + c];
                top[c] = score > top[c] || score != score ? score : top[c];
            }
        for (int64_t c = 0; c < TILE; ++c) {
            const float safe = top[c] == NOTHING ? 0.0f : top[c];  // where nothing is seen yet
            shrink[c] = exponential(largest[c] - safe);
            largest[c] = top[c];
            top[c] = safe;
            weights[c] *= shrink[c];
        }
        for (int64_t j = 0; j < BLOCK; ++j) weigh(scores + j * TILE, top, weights, TILE);
        for (int64_t c = 0; c < TILE; ++c)
            for (int64_t i = 0; i < WIDTH; ++i) sums[c * WIDTH + i] *= shrink[c];
        multiply<BLOCK, WIDTH, 1, TILE, INSIDE ? DIM : WIDTH>(scores, v, sums, TILE, true);
    }
    for (int64_t c = 0; c < used; ++c) {
        T* to = out + c / group * out_stride + c % group * WIDTH;
        const float scale_out = 1.0f / weights[c];
        for (int64_t i = 0; i < WIDTH; ++i) store(to[i], sums[c * WIDTH + i] * scale_out);
    }
}

// Stores a segment's keys and values of one key head; see `attend_prompts`.
template <typename T>
void store_head(const int64_t* segment, int64_t head, const T* key, const T* value, Widths widths,
                int64_t keys_before, int64_t values_before, int64_t key_stride,
                int64_t value_stride) {
    const int64_t dim = widths.key, width = widths.value;
    const int64_t place = head * segment[1] + segment[3];
    T* to_keys = part_of<T>(segment[0], segment[1], keys_before) + place * dim;
    T* to_values = part_of<T>(segment[0], segment[1], values_before) + place * width;
    for (int64_t t = 0; t < segment[4]; ++t) {
        const int64_t token = segment[2] + t;
        std::memcpy(to_keys + t * dim, key + token * key_stride + head * dim, dim * sizeof(T));
        if (!widths.values_in_keys)
            std::memcpy(to_values + t * width, value + token * value_stride + head * width,
                        width * sizeof(T));
    }
}

constexpr int64_t TILES_FROM = 16;  // tokens of a segment from which matrix tiles are faster

// A segment that attends by matrix tiles: the values of each key head are packed from position
// `from` on, a multiple of STEP, in so many steps.
template <typename T>
struct TileSegment {
    const int64_t* segment;
    int64_t from, steps;
    T* packed;
};

// Stores keys and values, then attends for segments of prompts, by tiles. A segment is (address of
// the KV row, its capacity, first token in the step, first position, length). Returns 0 when done;
// 1, with nothing written, if a segment is beyond its row or the step; 2, with nothing written, if
// memory runs out.
template <typename T, int64_t DIM, int64_t WIDTH, bool INSIDE>
int attend_prompts(const T* query, const T* key, const T* value, T* out, const int64_t* segments,
                   int64_t count, int64_t tokens, int64_t keys_before, int64_t values_before,
                   int64_t key_heads, int64_t group, int64_t query_stride, int64_t key_stride,
                   int64_t value_stride, Scoring scoring, int threads) {
    constexpr int64_t VALUE_ROW = INSIDE ? DIM : WIDTH;
    const Widths widths{DIM, WIDTH, INSIDE};
    const int64_t out_stride = key_heads * group * WIDTH;
    const int64_t split = (group + TILE - 1) / TILE, together = (group + split - 1) / split;
    const bool tiles = takes_tiles<T>(widths, scoring);
    struct Part {
        const int64_t* segment;
        int64_t start, size, pack;  // `pack` is of which of `packs` it is, or -1
    };
    std::vector<Part> parts;
    std::vector<TileSegment<T>> packs;
    std::unique_ptr<T[]> room;
    int64_t numbers = 0;
    try {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t* segment = segments + 5 * i;
            const int64_t first = segment[2], position = segment[3], length = segment[4];
            if (first < 0 || position < 0 || length < 0) return 1;
            if (position + length > segment[1] || first + length > tokens) return 1;
            int64_t pack = -1, size = TILE / together;
            if (tiles && length >= TILES_FROM) {
                const int64_t from = scoring.first(position) / STEP * STEP;
                const int64_t steps = (position + length - from + STEP - 1) / STEP;
                pack = static_cast<int64_t>(packs.size()), size = QUERIES;
                packs.push_back({segment, from, steps, nullptr});
                numbers += key_heads * steps * STEP * WIDTH;
            }
            for (int64_t start = 0; start < length; start += size)
                parts.push_back({segment, start, size, pack});
        }
        room.reset(new T[numbers]);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    T* free = room.get();
    for (TileSegment<T>& each : packs)
        each.packed = free, free += key_heads * each.steps * STEP * WIDTH;
    // The parts that see the most keys come first, so that small ones fill the end.
    std::reverse(parts.begin(), parts.end());
    const auto keys_of = [&](const int64_t* segment, int64_t head) {
        return part_of<T>(segment[0], segment[1], keys_before) + head * segment[1] * DIM;
    };
    const auto values_of = [&](const int64_t* segment, int64_t head) {
        return part_of<T>(segment[0], segment[1], values_before) + head * segment[1] * VALUE_ROW;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t i = 0; i < count; ++i)
            for (int64_t h = 0; h < key_heads; ++h)
                store_head(segments + 5 * i, h, key, value, widths, keys_before, values_before,
                           key_stride, value_stride);
        for (const TileSegment<T>& each : packs) {
#pragma omp for collapse(2) nowait
            for (int64_t h = 0; h < key_heads; ++h)
                for (int64_t step = 0; step < each.steps; ++step) {
                    const int64_t start = each.from + step * STEP;
                    const int64_t last = each.segment[3] + each.segment[4];
                    pack_values(values_of(each.segment, h) + start * VALUE_ROW, VALUE_ROW,
                                std::min(STEP, last - start), WIDTH,
                                each.packed + (h * each.steps + step) * STEP * WIDTH);
                }
        }
#pragma omp barrier
        const Tiles used(!packs.empty());
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < static_cast<int64_t>(parts.size()); ++p)
            for (int64_t i = 0; i < key_heads * split; ++i) {
                const int64_t h = i / split, begin = i % split * together;
                const int64_t heads = std::min(together, group - begin);
                const auto& [segment, start, size, pack] = parts[p];
                const int64_t token = segment[2] + start, position = segment[3] + start;
                const int64_t head = h * group + begin, some = std::min(size, segment[4] - start);
                const T *q = query + token * query_stride + head * DIM, *keys = keys_of(segment, h);
                const float* sinks = scoring.sinks ? scoring.sinks + head : nullptr;
                T* to = out + token * out_stride + head * WIDTH;
                if (heads <= 0) continue;
                if (pack < 0) {
                    attend_tile<T, DIM, WIDTH, INSIDE>(q, keys, values_of(segment, h), to, some,
                                                       heads, query_stride, out_stride, position,
                                                       scoring, sinks);
                    continue;
                }
                if constexpr (std::is_same_v<T, bfloat16>)
                    for (int64_t g = 0; g < heads; ++g)
                        attend_by_tiles(q + g * DIM, keys,
                                        packs[pack].packed + h * packs[pack].steps * STEP * WIDTH,
                                        to + g * WIDTH, some, widths, query_stride, out_stride,
                                        position, packs[pack].from, scoring,
                                        sinks ? sinks + g : nullptr);
            }
    }
    return 0;
}

// `attend_prompts` for heads of these widths; null if there is none.
template <typename T>
auto prompt_attention(const Widths& widths) {
    const auto are = [&](int64_t key, int64_t value, bool values_in_keys) {
        return widths.key == key && widths.value == value &&
               widths.values_in_keys == values_in_keys;
    };
    return are(16, 16, false)     ? attend_prompts<T, 16, 16, false>
           : are(32, 32, false)   ? attend_prompts<T, 32, 32, false>
           : are(64, 64, false)   ? attend_prompts<T, 64, 64, false>
           : are(96, 96, false)   ? attend_prompts<T, 96, 96, false>
           : are(128, 128, false) ? attend_prompts<T, 128, 128, false>
           : are(192, 128, false) ? attend_prompts<T, 192, 128, false>
           : are(256, 256, false) ? attend_prompts<T, 256, 256, false>
           : are(512, 512, false) ? attend_prompts<T, 512, 512, false>
           : are(576, 512, true)  ? attend_prompts<T, 576, 512, true>
                                  : nullptr;
}

inline bool attends_prompts(const Widths& widths) { return prompt_attention<float>(widths); }

}  // namespace
