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
constexpr int RUNGS = 4;
constexpr int64_t SHORT = 4096;  // scores among which a border is looked for at once
constexpr int64_t APART = 16;    // one in so many scores tells roughly where it is
constexpr int LOOKS = 5;         // most times that it is narrowed down before

// A number that grows as a score, which is not above 0, falls.
inline uint32_t rank_of(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof bits);
    return bits & 0x7fffffffu;
}

// Scores and their weights, in the order of their ids: a whole row, or some of it.
struct List {
    float* scores;
    float* weights;
    int32_t* ids;  // null for a whole row
    int64_t size;
};

// What a thread writes for one row, whose scores are filled up with NEVER to whole parts.
struct Room {
    List row;
    List kept;
    List border;
    int32_t* rest;   // places in a list, see `cut`
    double* sums;    // of each part's weights
    float* masses;   // the weight that each rung leaves, by part
    uint32_t* best;  // the rank of each group's best score
    int64_t parts;

    static int64_t parts_of(int64_t size) { return (size + PART - 1) / PART; }

    static int64_t bytes(int64_t width) {
        const int64_t part = sizeof(double) + 4 * (8 * PART + RUNGS + PART / GROUP);
        return (parts_of(width) * part + 63) / 64 * 64;
    }

    Room(char* start, int64_t width) : parts(parts_of(width)) {
        const int64_t size = parts * PART;
        float* lists = reinterpret_cast<float*>(start);
        int32_t* numbers = reinterpret_cast<int32_t*>(lists + 6 * size);
        row = {lists, lists + size, nullptr, size};
        kept = {lists + 2 * size, lists + 3 * size, numbers, 0};
        border = {lists + 4 * size, lists + 5 * size, nullptr, 0};
        rest = numbers + size;
        sums = reinterpret_cast<double*>(rest + size);
        masses = reinterpret_cast<float*>(sums + parts);
        best = reinterpret_cast<uint32_t*>(masses + parts * RUNGS);
    }

    // Where edited scores wait to be weighed: no list is there yet.
    float* edited() const { return kept.scores; }
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

// Calls `found` with each place of a list's group whose score passes `test`: fast where few do.
template <typename Test, typename Found>
void for_each(const List& list, int64_t start, Test test, Found found) {
    constexpr int64_t TOGETHER = sizeof(uint64_t);
    uint8_t marks[GROUP] = {};
    const float* scores = list.scores + start;
    if (start + GROUP <= list.size) {
        for (int64_t i = 0; i < GROUP; ++i) marks[i] = test(scores[i]) ? 1 : 0;
    } else {
        for (int64_t i = 0; i < list.size - start; ++i) marks[i] = test(scores[i]) ? 1 : 0;
    }
    for (int64_t first = 0; first < GROUP; first += TOGETHER) {
        uint64_t together;
        std::memcpy(&together, marks + first, TOGETHER);
        for (int64_t i = first; together && i < first + TOGETHER; ++i)
            if (marks[i]) found(start + i);
    }
}

// The scores of a row up to a rank.
inline List best_of(const Room& room, uint32_t rank) {
    const List& row = room.row;
    List kept = room.kept;
    int64_t size = 0;
    for (int64_t start = 0; start < row.size; start += GROUP) {
        if (room.best[start / GROUP] > rank) continue;
        for_each(row, start, [=](float score) { return rank_of(score) <= rank; }, [&](int64_t i) {
            kept.ids[size] = static_cast<int32_t>(i);
            kept.scores[size] = row.scores[i];
            kept.weights[size++] = row.weights[i];
        });
    }
    kept.size = size;
    return kept;
}

// Where a list of the best scores ends.
struct Cut {
    uint32_t rank;  // of its last score
    double before;  // the weight of all that are better
    int32_t first;  // the place of the first score of this rank
};

// The shortest list of best scores whose weight reaches `wanted`, or of all that have any weight;
// some must have. Weights are added up by the leading bits of ranks, then by the next ones where
// the list ends.
template <typename Weight>
Cut cut(const List& list, double wanted, int32_t* rest, Weight weight) {
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
            const int64_t at = first ? i : rest[i];
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
            const int32_t at = first ? static_cast<int32_t>(i) : rest[i];
            rest[left] = at;
            left += rank_of(list.scores[at]) >> shift == found.rank;
        }
        size = left;
    }
    found.first = rest[0];
    return found;
}

// Scores from `bottom` up to but without `top`.
struct Range {
    float bottom, top;

    int32_t has(float score) const { return (score >= bottom) & (score < top); }

    int32_t count(const float* scores, int64_t size) const {
        const Range own = *this;
        int32_t found = 0;
        for (int64_t i = 0; i < size; ++i) found += own.has(scores[i]);
        return found;
    }
};

// The weight of scores from `lowest` up, added up as Sum.
template <typename Sum>
Sum mass_from(const float* scores, const float* weights, int64_t size, float lowest) {
    Sum total = 0;
    for (int64_t i = 0; i < size; ++i) {
        const float weight = weights[i];  // loaded either way, so that it vectorises
        total += scores[i] >= lowest ? weight : 0.0f;
    }
    return total;
}

// About the score at which the list of the best ends that weighs `wanted`: what is left behind it
// weighs as much in a sample as in the list, in proportion.
inline float guess(const List& list, double wanted, double total, const Room& room) {
    List sample = room.border;
    for (int64_t i = 0; i < list.size; i += APART) {
        sample.scores[sample.size] = list.scores[i];
        sample.weights[sample.size++] = list.weights[i];
    }
    const double all = sum(sample.weights, sample.size), here = all - (total - wanted) / APART;
    if (all <= 0) return LEAST_EXPONENT;
    const Cut end =
        cut(sample, here, room.rest, [&](int64_t i) { return double(sample.weights[i]); });
    return std::min(sample.scores[end.first], -std::numeric_limits<float>::min());
}

// A range of scores in which the list of the best ends that weighs `wanted` of `total`: those above
// weigh less, and with it they weigh as much, or have all the weight. A few sums decide, on rungs
// that lie closer and closer, so that few scores are left wherever the list ends.
inline Range narrow(const List& list, double wanted, double total, const Room& room, int threads) {
    constexpr double ROUNDING = 1e-5;  // of float32 sums within a part
    Range range = {LEAST_EXPONENT, std::numeric_limits<float>::infinity()};
    if (list.size <= SHORT) return range;
    const float end = guess(list, wanted, total, room);
    float rungs[RUNGS] = {0.94f * end, 0.985f * end, 1.015f * end, 1.06f * end};
    const int64_t parts = Room::parts_of(list.size);
    for (int look = 0; look < LOOKS; ++look) {
        if (range.count(list.scores, list.size) <= SHORT) break;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t start = part * PART, size = std::min(PART, list.size - start);
            for (int rung = 0; rung < RUNGS; ++rung)
                room.masses[part * RUNGS + rung] = mass_from<float>(
                    list.scores + start, list.weights + start, size, rungs[rung]);
        }
        for (int rung = 0; rung < RUNGS; ++rung) {
            double mass = 0;
            for (int64_t part = 0; part < parts; ++part) mass += room.masses[part * RUNGS + rung];
            if (mass * (1 + ROUNDING) < wanted) range.top = std::min(range.top, rungs[rung]);
            if (mass * (1 - ROUNDING) >= wanted) range.bottom = std::max(range.bottom, rungs[rung]);
        }
        const float top = std::min(range.top, 0.0f);
        for (int rung = 0; rung < RUNGS; ++rung)
            rungs[rung] = top + (range.bottom - top) * (rung + 1) / (RUNGS + 1);
    }
    return range;
}

// The scores of a list within a range.
inline List within(const List& list, Range range, List to) {
    int64_t size = 0;
    for (int64_t start = 0; start < list.size; start += GROUP)
        for_each(list, start, [=](float score) { return range.has(score); }, [&](int64_t i) {
            to.scores[size] = list.scores[i];
            to.weights[size++] = list.weights[i];
        });
    to.size = size;
    return to;
}

// Leaves a weight to the scores up to a cut only; of those at the cut to the first `equal`.
inline void leave(const List& list, uint32_t rank, int64_t equal) {
    const float* __restrict scores = list.scores;
    float* __restrict weights = list.weights;
    int32_t at_cut = 0;
    for (int64_t i = 0; i < list.size; ++i) {
        const uint32_t own = rank_of(scores[i]);
        const float weight = weights[i];
        at_cut += own == rank ? 1 : 0;
        weights[i] = own > rank ? 0 : weight;
    }
    for (int64_t i = list.size - 1; at_cut > equal; --i)
        if (rank_of(scores[i]) == rank) {
            weights[i] = 0;
            --at_cut;
        }
}

// The sums of a list's weights in parts.
inline void add_up(const List& list, double* sums) {
    for (int64_t start = 0; start < list.size; start += PART)
        sums[start / PART] = sum(list.weights + start, std::min(PART, list.size - start));
}

// The first place up to which a list's weights exceed `point` of the whole; `sums` are by part.
inline int64_t drawn(const List& list, const double* sums, double point) {
    const double wanted = point * sum(sums, Room::parts_of(list.size));
    double before = 0;
    int64_t last = 0;
    for (int64_t start = 0; start < list.size; start += PART) {
        const double part = sums[start / PART];
        if (before + part <= wanted && start + PART < list.size) {
            before += part;
            continue;
        }
        for (int64_t i = start; i < std::min(list.size, start + PART); ++i) {
            if (list.weights[i] <= 0) continue;
            last = i;
            before += list.weights[i];
            if (before > wanted) return i;
        }
    }
    return last;  // sums in another order may differ in the last bit
}

// The `count` best tokens, at most `width`, best first and of equals the lowest id first.
inline void best_tokens(const Room& room, int64_t count, int64_t width, int64_t* tokens) {
    const float* scores = room.row.scores;
    int64_t found = 0;
    for (int64_t start = 0; count && start < width; start += GROUP) {
        const bool full = found == count;
        if (full && room.best[start / GROUP] >= rank_of(scores[tokens[count - 1]])) continue;
        for (int64_t i = start; i < std::min(width, start + GROUP); ++i) {
            const uint32_t rank = rank_of(scores[i]);
            if (found == count && rank >= rank_of(scores[tokens[count - 1]])) continue;
            int64_t at = found < count ? found++ : count - 1;
            for (; at > 0 && rank_of(scores[tokens[at - 1]]) > rank; --at)
                tokens[at] = tokens[at - 1];
            tokens[at] = i;
        }
    }
}

}  // namespace
