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
    }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
