// Picks a token for each row of logits: edits, the draw, log-probabilities. Nothing is sorted.
//
// A row's scores are scaled and weighed once, in parts of fixed size, so that sums do not depend on
// the number of threads. Where top_k ends is looked for among few scores, found by the best of each
// group of scores; where top_p ends in a narrow range, found by a few sums.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "rows.h"
#include "scalars.h"
#include "selection.h"

namespace {

constexpr int64_t FEW = 256;  // best scores that mostly have the weight that top_p wants

// How one row's token is picked; laid out as picking.py packs it.
struct Picking {
    double temperature, min_p, top_p, point, repetition, presence, frequency;
    int64_t top_k;
    int64_t best;    // number of best tokens whose log-probabilities are wanted; -1: none at all
    int64_t scored;  // the token whose log-probability is wanted; -1: the picked one's
    const uint32_t* allowed;  // a bit for each token; null allows all
    const int64_t* added;     // tokens, and what is added to their scores
    const double* amounts;
    int64_t additions;
    const int64_t* seen;   // tokens of prompt and answer, each once
    const int64_t* times;  // how often the answer has each of them
    int64_t distinct;

    bool edits() const { return allowed || additions || distinct; }
};

static_assert(sizeof(Picking) == 17 * 8);

// Log-probabilities of one row: of its token, then of the best tokens, whose ids are beside.
struct Logprobs {
    float* values;
    int64_t* ids;
};

// Writes a row's scores, with all that changes them before the temperature. False, if a token lies
// outside the row.
template <typename T>
bool edit(const T* row, const Picking& own, float* scores, int64_t width) {
    for (int64_t i = 0; i < width; ++i) scores[i] = load(row[i]);
    if (own.allowed) refuse(scores, own.allowed, width);
    const auto inside = [&](int64_t id) { return id >= 0 && id < width; };
    for (int64_t i = 0; i < own.additions; ++i) {
        if (!inside(own.added[i])) return false;
        scores[own.added[i]] += static_cast<float>(own.amounts[i]);
    }
    const float repetition = static_cast<float>(own.repetition);
    const float presence = static_cast<float>(own.presence);
    const float frequency = static_cast<float>(own.frequency);
    for (int64_t i = 0; i < own.distinct; ++i) {
        if (!inside(own.seen[i])) return false;
        float& score = scores[own.seen[i]];
        // The bound keeps a tiny penalty's quotient finite.
        if (repetition != 1)
            score = score > 0 ? std::min(score / repetition, std::numeric_limits<float>::max())
                              : score * repetition;
        if (own.times[i] > 0) score -= presence + frequency * static_cast<float>(own.times[i]);
    }
    return true;
}

// Fills `room` with a row's scores over the temperature, their weights, and the sums of these.
template <typename T>
void weigh(const T* row, float best, float temperature, float lowest, int64_t width,
           const Room& room, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < room.parts; ++part) {
        const int64_t start = part * PART;
        const int64_t count = std::min(PART, width - start);
        const T* __restrict from = row + start;
        float* __restrict scores = room.row.scores + start;
        float* __restrict weights = room.row.weights + start;
        for (int64_t i = 0; i < count; ++i) {
            // The best becomes 0 before anything divides, so that no temperature can overflow.
            const float score = (load(from[i]) - best) / temperature;
            scores[i] = score < lowest ? NEVER : score;
            weights[i] = exponential(scores[i]);
        }
        for (int64_t i = count; i < PART; ++i) {
            scores[i] = NEVER;
            weights[i] = 0;
        }
        room.sums[part] = sum(weights, PART);
        for (int64_t first = 0; first < PART; first += GROUP)
            room.best[(start + first) / GROUP] = best_rank(scores + first);
    }
}

// Draws from a row whose best score is finite.
template <typename T>
int64_t draw(const T* row, float best, const Picking& own, int64_t width, const Room& room,
             int threads) {
    const float temperature = static_cast<float>(own.temperature);
    const float lowest = own.min_p > 0 ? std::log(static_cast<float>(own.min_p)) : NEVER;
    weigh(row, best, temperature, lowest, width, room, threads);
    List kept = room.row;
    if (own.top_k > 0 && own.top_k < width) {
        kept = best_of(room, rank_of_best(room, own.top_k));
        if (own.top_k < kept.size) {
            const Cut end = cut(kept, own.top_k, room.rest, [](int64_t) { return 1.0; });
            leave(kept, end.rank, static_cast<int64_t>(own.top_k - end.before));
        }
        add_up(kept, room.sums);
    }
    if (own.top_p < 1) {
        const double total = sum(room.sums, Room::parts_of(kept.size));
        const double wanted = total * own.top_p;
        if (!kept.ids) {
            const List few = best_of(room, rank_of_best(room, FEW));
            if (sum(few.weights, few.size) >= wanted) kept = few;
        }
        const Range range = narrow(kept, wanted, total, room, threads);
        const List border = within(kept, range, room.border);
        const double here =
            wanted - mass_from<double>(kept.scores, kept.weights, kept.size, range.top);
        const Cut end =
            cut(border, here, room.rest, [&](int64_t i) { return double(border.weights[i]); });
        const double equal = std::ceil((here - end.before) / border.weights[end.first]);
        leave(kept, end.rank, std::max<int64_t>(1, static_cast<int64_t>(equal)));
        add_up(kept, room.sums);
    }
    const int64_t place = drawn(kept, room.sums, own.point);
    return kept.ids ? kept.ids[place] : place;
}

// Log-probabilities under the model itself, of a row whose best logit is `best`.
template <typename T>
void score(const T* row, float best, int64_t token, int64_t count, int64_t width, const Room& room,
           Logprobs to, int threads) {
    weigh(row, best, 1, NEVER, width, room, threads);
    // The best logit's weight is 1, so that the sum is not 0.
    const double norm = std::log(sum(room.sums, room.parts));
    to.values[0] = static_cast<float>(room.row.scores[token] - norm);
    best_tokens(room, std::min(count, width), width, to.ids);
    for (int64_t i = 0; i < std::min(count, width); ++i)
        to.values[1 + i] = static_cast<float>(room.row.scores[to.ids[i]] - norm);
}

// The token of one row: -1 if the row holds NaN or +inf or nothing is left, -2 if an edited or
// scored token lies outside the row.
template <typename T>
int64_t pick_row(const T* row, const Picking& own, int64_t width, const Room& room, Logprobs to,
                 int threads) {
    if (own.scored >= width) return -2;
    int64_t token = first_best(row, width);
    if (token < 0) return -1;
    const float best = load(row[token]);
    if (own.edits()) {
        float* scores = room.edited();
        if (!edit(row, own, scores, width)) return -2;
        token = first_best(scores, width);
        if (token < 0) return -1;
        if (own.temperature > 0) token = draw(scores, scores[token], own, width, room, threads);
    } else if (own.temperature > 0) {
        token = draw(row, best, own, width, room, threads);
    }
    if (own.best >= 0)
        score(row, best, own.scored < 0 ? token : own.scored, own.best, width, room, to, threads);
    return token;
}

// Picks a token for each of `count` rows. `values` is [count, 1 + most] and `ids` [count, most].
// Threads take rows, each with its own of the `rooms`; where there are fewer rows than threads, all
// work on one row after the other, in one room.
template <typename T>
void pick(const T* logits, const Picking* rows, int64_t* tokens, float* values, int64_t* ids,
          int64_t most, char* rooms, int64_t count, int64_t width, int threads) {
    const int within = count < threads ? threads : 1;
#pragma omp parallel for num_threads(threads) if (within == 1 && count * width > SERIAL) \
    schedule(dynamic)
    for (int64_t row = 0; row < count; ++row) {
        const int own = within == 1 ? omp_get_thread_num() : 0;
        const Room room(rooms + own * Room::bytes(width), width);
        const Logprobs to = {values + row * (1 + most), ids + row * most};
        tokens[row] = pick_row(logits + row * width, rows[row], width, room, to, within);
    }
}

}  // namespace
