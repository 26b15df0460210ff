// Draws tokens from rows of scores, in a few passes and without sorting.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "scalars.h"

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr int SETS = 4;
constexpr float LEAST_TEMPERATURE = std::numeric_limits<float>::min();

struct Settings {
    double temperature, min_p, top_k, top_p, point;
};

// Where a list of the best scores ends: the rank of its last score, and the weight of all that are
// better than that.
struct Cut {
    uint32_t rank;
    double before;
};

// A number that grows as a score, which is not above 0, falls.
inline uint32_t rank_of(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x7fffffffu;
}

// The shortest list of best scores whose weight reaches `wanted`, or of all that have any weight.
// Weights are added up by the leading bits of ranks, then by the next ones where the list ends.
template <typename Weight>
Cut cut(const float* scores, int64_t width, double wanted, Weight weight) {
    Cut found = {0, 0};
    int shift = 31;
    for (const int bits : {11, 10, 10}) {
        const uint32_t size = 1u << bits;
        // Several sets of bins, because two additions to one bin wait for each other.
        double bins[SETS][1 << 11] = {};
        shift -= bits;
        for (int64_t i = 0; i < width; ++i) {
            const uint32_t leading = rank_of(scores[i]) >> shift;
            if (leading >> bits == found.rank) bins[i % SETS][leading & (size - 1)] += weight(i);
        }
        uint32_t last = 0;
        double before = 0, better = 0;
        for (uint32_t bin = 0; bin < size; ++bin) {
            double all = 0;
            for (int set = 0; set < SETS; ++set) all += bins[set][bin];
            if (all <= 0) continue;
            last = bin;
            before = better;
            better += all;
            if (found.before + better >= wanted) break;
        }
        found = {found.rank << bits | last, found.before + before};
    }
    return found;
}

// Leaves the scores up to a cut; of those at the cut only the first `equal`.
inline void leave(float* scores, float* weights, int64_t width, uint32_t rank, int64_t equal) {
    int64_t at_cut = 0;
    for (int64_t i = 0; i < width; ++i) {
        const uint32_t own = rank_of(scores[i]);
        at_cut += own == rank;
        scores[i] = own > rank ? NEVER : scores[i];
        weights[i] = own > rank ? 0 : weights[i];
    }
    for (int64_t i = width - 1; at_cut > equal; --i)
        if (rank_of(scores[i]) == rank) {
            scores[i] = NEVER;
            weights[i] = 0;
            --at_cut;
        }
}

inline double sum(const float* weights, int64_t width) {
    double total = 0;
    for (int64_t i = 0; i < width; ++i) total += weights[i];
    return total;
}

// The first token whose cumulated weight exceeds `point` of the whole.
inline int64_t drawn(const float* weights, int64_t width, double point) {
    constexpr int64_t PART = 1024;
    const double wanted = point * sum(weights, width);
    double before = 0;
    int64_t last = 0;
    for (int64_t start = 0; start < width; start += PART) {
        const int64_t stop = std::min(width, start + PART);
        const double part = sum(weights + start, stop - start);
        if (before + part <= wanted && stop < width) {
            before += part;
            continue;
        }
        for (int64_t i = start; i < stop; ++i) {
            if (weights[i] <= 0) continue;
            last = i;
            before += weights[i];
            if (before > wanted) return i;
        }
    }
    return last;  // sums in another order may differ in the last bit
}

// Draws a token from each row of scores, whose largest is finite; overwrites the rows and
// `weights`, of the same size.
inline void draw(float* scores, float* weights, const Settings* settings, int64_t* tokens,
                 int64_t count, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < count; ++row) {
        const Settings own = settings[row];
        float* x = scores + row * width;
        float* w = weights + row * width;
        const float temperature = std::max(static_cast<float>(own.temperature), LEAST_TEMPERATURE);
        const float lowest = own.min_p > 0 ? std::log(static_cast<float>(own.min_p)) : NEVER;
        float best = NEVER;
        for (int64_t i = 0; i < width; ++i) best = x[i] > best ? x[i] : best;
        for (int64_t i = 0; i < width; ++i) {
            // The best becomes 0 before anything divides, so that no temperature can overflow.
            const float score = (x[i] - best) / temperature;
            x[i] = score < lowest ? NEVER : score;
            w[i] = exponential(x[i]);
        }
        if (own.top_k > 0 && own.top_k < width) {
            const Cut end = cut(x, width, own.top_k, [](int64_t) { return 1.0; });
            leave(x, w, width, end.rank, static_cast<int64_t>(own.top_k - end.before));
        }
        if (own.top_p < 1) {
            const double wanted = sum(w, width) * own.top_p;
            const Cut end = cut(x, width, wanted, [&](int64_t i) { return double(w[i]); });
            float score;
            std::memcpy(&score, &end.rank, sizeof score);
            const double each = exponential(-score);
            const double equal = each > 0 ? std::ceil((wanted - end.before) / each) : 1;
            leave(x, w, width, end.rank, std::max<int64_t>(1, static_cast<int64_t>(equal)));
        }
        tokens[row] = drawn(w, width, own.point);
    }
}

}  // namespace
