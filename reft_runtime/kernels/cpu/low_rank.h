// Low-rank edits of single rows, each with tensors of its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scalars.h"

namespace {

constexpr int64_t MAX_EDITED = 16384;  // widest row that is edited
constexpr int64_t MAX_RANK = 512;      // largest rank of an edit
constexpr int64_t COLUMNS_AT_ONCE = 256;  // numbers of a row whose sums stay in the cache

// The edit of row number `row`: V and U are [rank, width], b is [rank].
struct Edit {
    int64_t row;
    const float* V;
    const float* b;
    const float* U;
    int64_t rank;
};

// Products of one row with four rows of V, which lie `width` apart.
inline void four_dots(const float* row, const float* V, float* sums, int64_t width) {
    const float *V1 = V + width, *V2 = V1 + width, *V3 = V2 + width;
    float a = 0, b = 0, c = 0, d = 0;
    for (int64_t i = 0; i < width; ++i) {
        a += row[i] * V[i];
        b += row[i] * V1[i];
        c += row[i] * V2[i];
        d += row[i] * V3[i];
    }
    sums[0] = a;
    sums[1] = b;
    sums[2] = c;
    sums[3] = d;
}

inline float dot(const float* row, const float* V, int64_t width) {
    float sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += row[i] * V[i];
    return sum;
}

// row += strength * (V row + b) U for each edit of `hidden` [*, width]; no two edits have one row.
template <typename T>
void edit_rows(T* hidden, const Edit* edits, const float* strengths, int64_t count, int64_t width,
               int threads) {
#pragma omp parallel for num_threads(threads) if (count > 1)
    for (int64_t number = 0; number < count; ++number) {
        const Edit& edit = edits[number];
        T* row = hidden + edit.row * width;
        float old[MAX_EDITED], low[MAX_RANK];
        for (int64_t i = 0; i < width; ++i) old[i] = load(row[i]);
        int64_t k = 0;
        for (; k + 4 <= edit.rank; k += 4) four_dots(old, edit.V + k * width, low + k, width);
        for (; k < edit.rank; ++k) low[k] = dot(old, edit.V + k * width, width);
        for (k = 0; k < edit.rank; ++k) low[k] = (low[k] + edit.b[k]) * strengths[number];
        for (int64_t start = 0; start < width; start += COLUMNS_AT_ONCE) {
            const int64_t size = std::min(COLUMNS_AT_ONCE, width - start);
            float sums[COLUMNS_AT_ONCE] = {};
            for (k = 0; k < edit.rank; ++k) {
                const float* U = edit.U + k * width + start;
                for (int64_t i = 0; i < size; ++i) sums[i] += low[k] * U[i];
            }
            for (int64_t i = 0; i < size; ++i) store(row[start + i], old[start + i] + sums[i]);
        }
    }
}

}  // namespace
