// Small operators of a decoder step on a CPU, fused: what torch does in several passes over memory
// and a dispatch each is one pass here. Compiled at first use (build.py); plain C++17 and OpenMP,
// vectorised by the compiler. Every function takes the number of threads to use. Arithmetic is in
// float32, rounded once to the tensor's own type (but see norm_row).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t SERIAL = 16384;  // elements up to which one thread is faster than several

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float& to, float value) { to = value; }

inline void store(bfloat16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Round to nearest even; a NaN stays one.
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp by range reduction and a polynomial, within 2 units in the last place; vectorises, where
// std::exp would not. NaN gives NaN, -inf gives 0.
inline float exponential(float x) {
    const float clamped = std::min(std::max(x, -87.33654f), 88.72283f);
    const float whole = std::floor(clamped * 1.44269504f + 0.5f);
    const float rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    // 2^whole in two factors: whole reaches 128, and one factor's exponent only 127.
    const int32_t half = static_cast<int32_t>(whole) >> 1;
    const int32_t other = static_cast<int32_t>(whole) - half;
    const uint32_t a = static_cast<uint32_t>(half + 127) << 23;
    const uint32_t b = static_cast<uint32_t>(other + 127) << 23;
    float first, second;
    std::memcpy(&first, &a, sizeof first);
    std::memcpy(&second, &b, sizeof second);
    const float result = x < -87.33654f ? 0.0f : y * first * second;
    return x != x ? x : result;
}

template <typename T>
void norm_row(const T* x, const T* weight, T* out, int64_t width, float epsilon) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) {
        const float value = load(x[i]);
        sum += value * value;
    }
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) {
        T normal;  // rounded before the weight is applied, as the models do
        store(normal, load(x[i]) * scale);
        store(out[i], load(normal) * load(weight[i]));
    }
}

template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t width, float epsilon,
              int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row)
        norm_row(x + row * width, weight, out + row * width, width, epsilon);
}

template <typename T>
void add_rms_norm(const T* x, const T* more, const T* weight, T* total, T* out, int64_t rows,
                  int64_t width, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        for (int64_t i = at; i < at + width; ++i) store(total[i], load(x[i]) + load(more[i]));
        norm_row(total + at, weight, out + at, width, epsilon);
    }
}

// Of each row [gate | up], both of `width`.
template <typename T>
void silu_mul(const T* both, T* out, int64_t rows, int64_t width, int threads) {
    constexpr int64_t PART = 1024;
#pragma omp parallel for num_threads(threads) collapse(2) if (rows * width > SERIAL)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t start = 0; start < width; start += PART) {
            const T* gate = both + row * 2 * width;
            const T* up = gate + width;
            T* to = out + row * width;
            const int64_t stop = std::min(width, start + PART);
            for (int64_t i = start; i < stop; ++i) {
                const float g = load(gate[i]);
                store(to[i], g / (1.0f + exponential(-g)) * load(up[i]));
            }
        }
}

template <typename T>
void rotate_heads(T* heads, const T* cos, const T* sin, int64_t count, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t head = 0; head < count; ++head) {
        T* at = heads + head * dim;
        for (int64_t i = 0; i < half; ++i) {
            const float a = load(at[i]), b = load(at[i + half]);
            store(at[i], a * load(cos[i]) - b * load(sin[i]));
            store(at[i + half], b * load(cos[i + half]) + a * load(sin[i + half]));
        }
    }
}

template <typename T>
void rotate(T* query, T* key, const T* cos, const T* sin, int64_t tokens, int64_t query_heads,
            int64_t key_heads, int64_t dim, int64_t query_stride, int64_t key_stride,
            int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * query_heads * dim > SERIAL)
    for (int64_t token = 0; token < tokens; ++token) {
        const T* c = cos + token * dim;
        const T* s = sin + token * dim;
        rotate_heads(query + token * query_stride, c, s, query_heads, dim);
        rotate_heads(key + token * key_stride, c, s, key_heads, dim);
    }
}

constexpr int64_t BLOCK = 64;      // positions whose scores are held at once
constexpr int64_t MAX_DIM = 256;   // of a head
constexpr int64_t MAX_GROUP = 64;  // query heads that share a key head

inline const float* widen(const float* from, float*, int64_t) { return from; }

inline const float* widen(const bfloat16* from, float* scratch, int64_t size) {
    for (int64_t i = 0; i < size; ++i) scratch[i] = load(from[i]);
    return scratch;
}

// The query heads of one token that share a key head, over cached positions [first, last].
// DIM is the heads' width where it is known when compiling, 0 where it is not.
template <typename T, int DIM>
void attend_group(const T* query, const T* keys, const T* values, T* out, int64_t group,
                  int64_t dim, int64_t first, int64_t last, float scale) {
    if (DIM) dim = DIM;
    float queries[MAX_GROUP * (DIM ? DIM : MAX_DIM)], sums[MAX_GROUP * (DIM ? DIM : MAX_DIM)];
    float largest[MAX_GROUP], weights[MAX_GROUP], scores[BLOCK];
    float scratch[BLOCK * (DIM ? DIM : MAX_DIM)];
    float key_scratch[BLOCK * (DIM ? DIM : MAX_DIM)];
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(query[i]) * scale, sums[i] = 0;
    for (int64_t g = 0; g < group; ++g) {
        largest[g] = -std::numeric_limits<float>::infinity();
        weights[g] = 0;
    }
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        const float* k = widen(keys + start * dim, key_scratch, count * dim);
        const float* v = widen(values + start * dim, scratch, count * dim);
        for (int64_t g = 0; g < group; ++g) {
            const float* q = queries + g * dim;
            float top = largest[g];
            for (int64_t j = 0; j < count; ++j) {
                float dot = 0;
                for (int64_t i = 0; i < dim; ++i) dot += q[i] * k[j * dim + i];
                scores[j] = dot;
                top = dot > top || dot != dot ? dot : top;
            }
            float* sum = sums + g * dim;
            const float shrink = exponential(largest[g] - top);
            float weight = weights[g] * shrink;
            for (int64_t j = 0; j < count; ++j) {
                scores[j] = exponential(scores[j] - top);
                weight += scores[j];
            }
            float acc[DIM ? DIM : MAX_DIM];
            for (int64_t i = 0; i < dim; ++i) acc[i] = sum[i] * shrink;
            for (int64_t j = 0; j < count; ++j)
                for (int64_t i = 0; i < dim; ++i) acc[i] += scores[j] * v[j * dim + i];
            for (int64_t i = 0; i < dim; ++i) sum[i] = acc[i];
            largest[g] = top;
            weights[g] = weight;
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        const float scale_out = 1.0f / weights[g];
        for (int64_t i = 0; i < dim; ++i) store(out[g * dim + i], sums[g * dim + i] * scale_out);
    }
}

template <typename T>
void attend(const T* query, const T* key, const T* value, T* keys, T* values, T* out,
            const int64_t* slots, const int64_t* positions, int64_t tokens, int64_t key_heads,
            int64_t group, int64_t dim, int64_t capacity, int64_t query_stride,
            int64_t key_stride, int64_t value_stride, int64_t window, float scale, int threads) {
    const int64_t head = capacity * dim, row = key_heads * head;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t to = slots[token] * row + h * head + positions[token] * dim;
                std::memcpy(keys + to, key + token * key_stride + h * dim, dim * sizeof(T));
                std::memcpy(values + to, value + token * value_stride + h * dim, dim * sizeof(T));
            }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t last = positions[token];
                const int64_t first = window ? std::max<int64_t>(0, last - window + 1) : 0;
                const T* q = query + token * query_stride + h * group * dim;
                T* to = out + (token * key_heads + h) * group * dim;
                const T* k = keys + slots[token] * row + h * head;
                const T* v = values + slots[token] * row + h * head;
                auto* attend_one = dim == 64    ? attend_group<T, 64>
                                   : dim == 128 ? attend_group<T, 128>
                                                : attend_group<T, 0>;
                attend_one(q, k, v, to, group, dim, first, last, scale);
            }
    }
}

// Sixteen floats, in as many registers as that takes; arithmetic on them is element by element.
typedef float lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 4;   // of a product, computed at once
constexpr int64_t TILE = 48;  // query heads times tokens that go over the keys together, at most

// c [rows, N] (+)= a [rows, DEPTH] b [DEPTH, N], by rows of c; rows a multiple of ROWS, N of LANES.
template <int64_t DEPTH, int64_t N, int64_t A_ROW, int64_t A_DEPTH>
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
                    std::memcpy(&right[w], b + k * N + column + w * LANES, sizeof(lanes));
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

// Tokens of one prompt at `position` and the following, and their query heads that share a key
// head: TILE columns (token, head) of scores, whose rows are keys.
template <typename T, int64_t DIM>
void attend_tile(const T* query, const T* keys, const T* values, T* out, int64_t tokens,
                 int64_t group, int64_t query_stride, int64_t out_stride, int64_t position,
                 int64_t window, float scale) {
    constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    alignas(64) float queries[DIM * TILE], scores[BLOCK * TILE], sums[TILE * DIM];
    alignas(64) float key_scratch[BLOCK * DIM], value_scratch[BLOCK * DIM];
    alignas(64) float largest[TILE], top[TILE], shrink[TILE], weights[TILE];
    const int64_t used = tokens * group;
    std::fill_n(queries, DIM * TILE, 0.0f);
    std::fill_n(sums, TILE * DIM, 0.0f);
    std::fill_n(largest, TILE, NOTHING);
    std::fill_n(weights, TILE, 0.0f);
    for (int64_t c = 0; c < used; ++c) {
        const T* from = query + c / group * query_stride + c % group * DIM;
        for (int64_t i = 0; i < DIM; ++i) queries[i * TILE + c] = load(from[i]) * scale;
    }
    const int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
    const int64_t last = position + tokens - 1;
    for (int64_t start = first; start <= last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last + 1 - start);
        const float* k = widen_block<DIM>(keys + start * DIM, key_scratch, count);
        const float* v = widen_block<DIM>(values + start * DIM, value_scratch, count);
        multiply<DIM, TILE, DIM, 1>(k, queries, scores, BLOCK, false);
        // Key start + j is seen by the tokens from its own position on, `window` of them.
        for (int64_t j = 0; j < BLOCK; ++j) {
            const int64_t from = std::clamp<int64_t>((start + j - position) * group, 0, TILE);
            const int64_t to =
                window ? std::clamp<int64_t>((start + j + window - position) * group, 0, TILE)
                       : TILE;
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
        for (int64_t j = 0; j < BLOCK; ++j)
            for (int64_t c = 0; c < TILE; ++c) {
                scores[j * TILE + c] = exponential(scores[j * TILE + c] - top[c]);
                weights[c] += scores[j * TILE + c];
            }
        for (int64_t c = 0; c < TILE; ++c)
            for (int64_t i = 0; i < DIM; ++i) sums[c * DIM + i] *= shrink[c];
        multiply<BLOCK, DIM, 1, TILE>(scores, v, sums, TILE, true);
    }
    for (int64_t c = 0; c < used; ++c) {
        T* to = out + c / group * out_stride + c % group * DIM;
        const float scale_out = 1.0f / weights[c];
        for (int64_t i = 0; i < DIM; ++i) store(to[i], sums[c * DIM + i] * scale_out);
    }
}

// Segments of prompts (first token of the step, slot, first position, length), tiled.
template <typename T, int64_t DIM>
void attend_prompts(const T* query, const T* key, const T* value, T* keys, T* values, T* out,
                    const int64_t* segments, int64_t count, int64_t key_heads, int64_t group,
                    int64_t capacity, int64_t query_stride, int64_t key_stride,
                    int64_t value_stride, int64_t window, float scale, int threads) {
    const int64_t head = capacity * DIM, row = key_heads * head;
    const int64_t out_stride = key_heads * group * DIM;
    const int64_t tile = TILE / group;
    struct Part {
        const int64_t* segment;
        int64_t start;
    };
    std::vector<Part> parts;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* segment = segments + 4 * i;
        for (int64_t start = 0; start < segment[3]; start += tile) parts.push_back({segment, start});
    }
    // What sees most comes first: the small parts fill up at the end.
    std::reverse(parts.begin(), parts.end());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t i = 0; i < count; ++i)
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t* segment = segments + 4 * i;
                T* to_keys = keys + segment[1] * row + h * head + segment[2] * DIM;
                T* to_values = values + segment[1] * row + h * head + segment[2] * DIM;
                for (int64_t t = 0; t < segment[3]; ++t) {
                    const int64_t token = segment[0] + t;
                    std::memcpy(to_keys + t * DIM, key + token * key_stride + h * DIM,
                                DIM * sizeof(T));
                    std::memcpy(to_values + t * DIM, value + token * value_stride + h * DIM,
                                DIM * sizeof(T));
                }
            }
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < static_cast<int64_t>(parts.size()); ++p)
            for (int64_t h = 0; h < key_heads; ++h) {
                const int64_t* segment = parts[p].segment;
                const int64_t start = parts[p].start, token = segment[0] + start;
                const int64_t place = segment[1] * row + h * head;
                attend_tile<T, DIM>(query + token * query_stride + h * group * DIM, keys + place,
                                    values + place, out + token * out_stride + h * group * DIM,
                                    std::min(tile, segment[3] - start), group, query_stride,
                                    out_stride, segment[2] + start, window, scale);
            }
    }
}

// A number that orders like the float whose bits these are; NaN is beyond the infinities.
template <typename I>
inline I ordered(I bits) {
    return bits ^ ((bits >> (8 * sizeof(I) - 1)) & std::numeric_limits<I>::max());
}

// For each row the first of its largest elements, or -1: where it holds NaN or +inf, or is all -inf.
template <typename T>
void greedy(const T* rows, int64_t* best, int64_t count, int64_t width, int threads) {
    using I = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
    constexpr I LARGEST = std::numeric_limits<I>::max();
    T infinity;
    store(infinity, std::numeric_limits<float>::infinity());
    I infinite;
    std::memcpy(&infinite, &infinity, sizeof infinite);
#pragma omp parallel for num_threads(threads) if (count * width > SERIAL)
    for (int64_t row = 0; row < count; ++row) {
        const T* x = rows + row * width;
        I top = std::numeric_limits<I>::min(), magnitude = 0;
        for (int64_t i = 0; i < width; ++i) {
            I bits;
            std::memcpy(&bits, x + i, sizeof bits);
            const I order = ordered(bits), size = bits & LARGEST;
            top = order > top ? order : top;
            magnitude = size > magnitude ? size : magnitude;
        }
        const I bits = ordered(top);  // is its own inverse
        T value;
        std::memcpy(&value, &bits, sizeof value);
        int64_t at = -1;
        // A magnitude beyond infinity's is NaN; infinity itself may be a banned token's -inf.
        if (magnitude <= infinite && (bits & LARGEST) != infinite) {
            at = 0;
            while (load(x[at]) != load(value)) ++at;
        }
        best[row] = at;
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                            \
    extern "C" void rms_norm_##NAME(const T* x, const T* weight, T* out, int64_t rows,             \
                                    int64_t width, float epsilon, int threads) {                   \
        rms_norm(x, weight, out, rows, width, epsilon, threads);                                   \
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
    extern "C" void greedy_##NAME(const T* rows, int64_t* best, int64_t count, int64_t width,      \
                                  int threads) {                                                   \
        greedy(rows, best, count, width, threads);                                                 \
    }                                                                                              \
    extern "C" void rotate_##NAME(T* query, T* key, const T* cos, const T* sin, int64_t tokens,    \
                                  int64_t query_heads, int64_t key_heads, int64_t dim,             \
                                  int64_t query_stride, int64_t key_stride, int threads) {         \
        rotate(query, key, cos, sin, tokens, query_heads, key_heads, dim, query_stride,            \
               key_stride, threads);                                                               \
    }                                                                                              \
    extern "C" void attend_##NAME(const T* query, const T* key, const T* value, T* keys,           \
                                  T* values, T* out, const int64_t* slots,                         \
                                  const int64_t* positions, int64_t tokens, int64_t key_heads,     \
                                  int64_t group, int64_t dim, int64_t capacity,                    \
                                  int64_t query_stride, int64_t key_stride, int64_t value_stride,  \
                                  int64_t window, float scale, int threads) {                      \
        attend(query, key, value, keys, values, out, slots, positions, tokens, key_heads, group,   \
               dim, capacity, query_stride, key_stride, value_stride, window, scale, threads);     \
    } \
    extern "C" void attend_prompts_##NAME(                                                         \
        const T* query, const T* key, const T* value, T* keys, T* values, T* out,                  \
        const int64_t* segments, int64_t count, int64_t key_heads, int64_t group, int64_t dim,     \
        int64_t capacity, int64_t query_stride, int64_t key_stride, int64_t value_stride,          \
        int64_t window, float scale, int threads) {                                                \
        auto* run = dim == 16    ? attend_prompts<T, 16>                                           \
                    : dim == 32  ? attend_prompts<T, 32>                                           \
                    : dim == 64  ? attend_prompts<T, 64>                                           \
                    : dim == 96  ? attend_prompts<T, 96>                                           \
                    : dim == 128 ? attend_prompts<T, 128>                                          \
                                 : attend_prompts<T, 256>;                                         \
        run(query, key, value, keys, values, out, segments, count, key_heads, group, capacity,     \
            query_stride, key_stride, value_stride, window, scale, threads);                       \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
