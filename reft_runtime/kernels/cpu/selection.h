// The best of a row of scores, none of them above 0: by count, by weight, and drawn by weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "scalars.h"

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr int64_t PART = 1024;  // scores whose weights are added up at once
constexpr int64_t GROUP = 64;   // scores of which the best is remembered
constexpr int SETS = 4;
constexpr int RUNGS = 8;
constexpr float LADDER[RUNGS] = {-0.5f, -1, -2, -3, -4.5f, -6.5f, -9, -13};

// A number that grows as a score, which is not above 0, falls.
inline uint32_t rank_of(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x7fffffffu;
}

// Scores, in the order of their ids.
struct List {
    int32_t* ids;
    float* scores;
    float* weights;
    int32_t* rest;
    int64_t size;
};

// What a thread writes for one row, whose scores are filled up with NEVER to whole parts.
struct Room {
    double* sums;      // of each part's weights
    double* masses;    // of the weights that each rung of the ladder leaves, by part
    float* scores;
    float* weights;
    List list;
    uint32_t* best;    // the rank of each group's best score
    int64_t parts;

    static int64_t parts_of(int64_t width) { return (width + PART - 1) / PART; }

    static int64_t bytes(int64_t width) {
        const int64_t part = (1 + RUNGS) * sizeof(double) + 6 * PART * 4 + PART / GROUP * 4;
        return (parts_of(width) * part + 63) / 64 * 64;
    }

    Room(char* start, int64_t width) : parts(parts_of(width)) {
        const int64_t size = parts * PART;
        sums = reinterpret_cast<double*>(start);
        masses = sums + parts;
        scores = reinterpret_cast<float*>(masses + parts * RUNGS);
        weights = scores + size;
        list.scores = weights + size;
        list.weights = list.scores + size;
        list.ids = reinterpret_cast<int32_t*>(list.weights + size);
        list.rest = list.ids + size;
        list.size = 0;
        best = reinterpret_cast<uint32_t*>(list.rest + size);
    }

    // Where edited scores wait to be weighed: no list is there yet.
    float* edited() const { return list.scores; }
};

template <typename T>
double sum(const T* weights, int64_t width) {
    double total = 0;
    for (int64_t i = 0; i < width; ++i) total += weights[i];
    return total;
}

inline uint32_t best_rank(const float* group) {
    uint32_t best = ~0u;
    for (int64_t i = 0; i < GROUP; ++i) best = std::min(best, rank_of(group[i]));
    return best;
}

// The weight of a part's scores down to `lowest`; rounded, see `rank_of_mass`.
inline float mass(const float* scores, const float* weights, float lowest) {
    float total = 0;
    for (int64_t i = 0; i < PART; ++i) total += scores[i] >= lowest ? weights[i] : 0.0f;
    return total;
}

// The rank of the last score that has a weight.
inline uint32_t last_rank() { return rank_of(LEAST_EXPONENT); }

// A rank that at least `count` scores reach, or all that have a weight, and not many more: as many
// groups have their best there.
inline uint32_t rank_of_best(const Room& room, int64_t count) {
    const int64_t groups = room.parts * PART / GROUP;
    uint32_t below = 0, reached = last_rank();
    while (reached - below > 1) {
        const uint32_t middle = below + (reached - below) / 2;
        int32_t found = 0;
        for (int64_t i = 0; i < groups; ++i) found += room.best[i] <= middle;
        if (found < count) {
            below = middle;
        } else {
            reached = middle;
            if (found <= count + count / 8) break;
        }
    }
    return reached;
}

// A rank up to which the scores weigh at least `wanted`, or all that have a weight.
inline uint32_t rank_of_mass(const Room& room, double wanted) {
    constexpr double ROUNDING = 1e-4;
    for (int rung = 0; rung < RUNGS; ++rung) {
        double total = 0;
        for (int64_t part = 0; part < room.parts; ++part) total += room.masses[part * RUNGS + rung];
        if (total * (1 - ROUNDING) >= wanted) return rank_of(LADDER[rung]);
    }
    return last_rank();
}

// The scores up to a rank.
inline List gather(const Room& room, uint32_t rank) {
    List list = room.list;
    const int64_t groups = room.parts * PART / GROUP;
    for (int64_t group = 0; group < groups; ++group) {
        if (room.best[group] > rank) continue;
        for (int64_t i = group * GROUP; i < (group + 1) * GROUP; ++i) {
            list.ids[list.size] = static_cast<int32_t>(i);
            list.scores[list.size] = room.scores[i];
            list.weights[list.size] = room.weights[i];
            list.size += rank_of(room.scores[i]) <= rank;
        }
    }
    return list;
}

// Where a list of the best scores ends: the rank of its last score, and the weight of all that are
// better than that.
struct Cut {
    uint32_t rank;
    double before;
    int32_t first;  // of the list, that has this rank
};

// The shortest list of best scores whose weight reaches `wanted`, or of all that have any weight.
// Weights are added up by the leading bits of ranks, then by the next ones where the list ends.
template <typename Weight>
Cut cut(const List& list, double wanted, Weight weight) {
    Cut found = {0, 0, 0};
    int shift = 31;
    int64_t size = list.size;
    for (const int bits : {11, 10, 10}) {
        const uint32_t mask = (1u << bits) - 1;
        const bool first = shift == 31;
        // Several sets of bins, because two additions to one bin wait for each other.
        double bins[1 << 11][SETS] = {};
        shift -= bits;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t at = first ? i : list.rest[i];
            bins[rank_of(list.scores[at]) >> shift & mask][i % SETS] += weight(at);
        }
        uint32_t last = 0;
        double before = 0, better = 0;
        for (uint32_t bin = 0; bin <= mask; ++bin) {
            double all = 0;
            for (int set = 0; set < SETS; ++set) all += bins[bin][set];
            if (all <= 0) continue;
            last = bin;
            before = better;
            better += all;
            if (found.before + better >= wanted) break;
        }
        found = {found.rank << bits | last, found.before + before, 0};
        int64_t left = 0;
        for (int64_t i = 0; i < size; ++i) {
            const int32_t at = first ? static_cast<int32_t>(i) : list.rest[i];
            list.rest[left] = at;
            left += rank_of(list.scores[at]) >> shift == found.rank;
        }
        size = left;
    }
    found.first = list.rest[0];
    return found;
}

// Leaves a weight to the scores up to a cut only; of those at the cut to the first `equal`.
inline void leave(const List& list, uint32_t rank, int64_t equal) {
    int64_t at_cut = 0;
    for (int64_t i = 0; i < list.size; ++i) {
        const uint32_t own = rank_of(list.scores[i]);
        at_cut += own == rank;
        list.weights[i] = own > rank ? 0 : list.weights[i];
    }
    for (int64_t i = list.size - 1; at_cut > equal; --i)
        if (rank_of(list.scores[i]) == rank) {
            list.weights[i] = 0;
            --at_cut;
        }
}

// The sums of weights in parts.
inline void add_up(const float* weights, double* sums, int64_t size) {
    for (int64_t start = 0; start < size; start += PART)
        sums[start / PART] = sum(weights + start, std::min(PART, size - start));
}

// The first of `size` weights up to which they exceed `point` of the whole; `sums` are by part.
inline int64_t drawn(const float* weights, const double* sums, int64_t size, double point) {
    const double wanted = point * sum(sums, Room::parts_of(size));
    double before = 0;
    int64_t last = 0;
    for (int64_t start = 0; start < size; start += PART) {
        const double part = sums[start / PART];
        if (before + part <= wanted && start + PART < size) {
            before += part;
            continue;
        }
        for (int64_t i = start; i < std::min(size, start + PART); ++i) {
            if (weights[i] <= 0) continue;
            last = i;
            before += weights[i];
            if (before > wanted) return i;
        }
    }
    return last;  // sums in another order may differ in the last bit
}

// The `count` best tokens, at most `width`, best first and of equals the lowest id first.
inline void best_tokens(const Room& room, int64_t count, int64_t width, int64_t* tokens) {
    int64_t found = 0;
    for (int64_t start = 0; count && start < width; start += GROUP) {
        if (found == count && room.best[start / GROUP] >= rank_of(room.scores[tokens[count - 1]]))
            continue;
        for (int64_t i = start; i < std::min(width, start + GROUP); ++i) {
            const uint32_t rank = rank_of(room.scores[i]);
            if (found == count && rank >= rank_of(room.scores[tokens[count - 1]])) continue;
            int64_t at = found < count ? found++ : count - 1;
            for (; at > 0 && rank_of(room.scores[tokens[at - 1]]) > rank; --at)
                tokens[at] = tokens[at - 1];
            tokens[at] = i;
        }
    }
}

}  // namespace
