// Sorted attention on CPUs, fused: gather, scores, softmax and products of one strip of slots stay in a core's cache.
//
// The mathematics is that of reference.py. native_library.py compiles this file, native.py calls it.
//
// How the work is divided:
// - A row (one head of one sequence) has a sorted order for each round. Its slots are cut into strips. A strip gathers
//   the keys in reach of its queries into scratch memory, and computes its queries in blocks of BLOCK.
// - Products are outer-product tiles of ROWS × PANEL, accumulated in registers. Keys lie in panels of PANEL, transposed,
//   so that lanes are keys; a group of ROWS queries computes only the panels that its intervals touch.
// - The pass over a round is one phase for the forward pass. In the backward pass, strips next to each other add to the
//   same keys, so even strips run first, then odd ones, then the ring's (rule `chunk`): no two threads
//   write to the same place, and sums have one order. The result does not depend on the number of threads.
// - Rounds follow each other, and merge into the output by a running maximum and sum (forward) or add to the gradients
//   (backward, from the log-sum-exp over all rounds). Memory beyond inputs and results is two numbers a position.
//
// Vectors are the compiler's own (GCC and Clang), as wide as the machine it compiles for.

#include "hashing.h"
#include "phases.h"
#include "strip.h"

namespace {

// How many rows there are; how many strips, and how many pieces, each row is cut into; how many rows are computed at a
// time (step): so few that their vectors stay in the shared cache, but enough to give all threads work.
struct Cut {
    int64_t rows, strips, pieces, step;

    Cut(const Problem& p, const Shape& s)
        : rows((int64_t)p.batch * p.heads),
          strips((p.length + s.strip - 1) / s.strip),
          pieces((p.length + PIECE - 1) / PIECE),
          step(std::min(rows, std::max<int64_t>(1, (8 * p.threads + strips - 1) / strips))) {}
};

// After all rounds: divide the sums by the total weight, and store the log-sum-exp. A position that attends to nothing
// takes its own value (own_if_alone) or stays zero. Visits slots, because only the slot tells whether a position is real.
void finish_forward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const int32_t* positions = p.positions + row * p.positions_row;
    const char* v_row = row_of(p.v, row, p.heads);
    Buffer<float> value(s.wide_v);
    for (int64_t slot = begin; slot < std::min<int64_t>(begin + PIECE, p.length); ++slot) {
        const int32_t position = positions[slot];
        if (position < p.first_query) continue;
        float* out = floats_at(p.out, row, p.heads, position);
        float &lse = p.peak[row * p.length + position], total = p.total[row * p.length + position];
        if (lse > EXCLUDED) {
            const float share = 1.0f / total;
            for (int c = 0; c < s.dv; ++c) out[c] *= share;
            lse += std::log(total);
            continue;
        }
        lse = EMPTY;
        if (!p.own_if_alone || slot >= p.real_lengths[row]) continue;
        const float scale = self_scale(p, row, position);
        fetch(value, p.v, v_row, position);
        for (int c = 0; c < s.dv; ++c) out[c] = value[c] * scale;
    }
}

// Before all rounds: store grad · out of every position, and pass the gradient of own values on to v.
void begin_backward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const int32_t* positions = p.positions + row * p.positions_row;
    const char* grad_row = row_of(p.grad, row, p.heads);
    Buffer<float> grad(s.wide_v);
    for (int64_t slot = begin; slot < std::min<int64_t>(begin + PIECE, p.length); ++slot) {
        const int32_t position = positions[slot];
        const float* out = floats_at(p.out, row, p.heads, position);
        fetch(grad, p.grad, grad_row, position);
        p.total[row * p.length + position] = dot(grad, out, s.dv);
        const bool empty = p.peak[row * p.length + position] >= EMPTY;
        if (!empty || !p.own_if_alone || slot >= p.real_lengths[row]) continue;
        const float scale = self_scale(p, row, position);
        float* dv = floats_at(p.dv, row, p.heads, position);
        for (int c = 0; c < s.dv; ++c) dv[c] += grad[c] * scale;
    }
}

// If keys are unit queries, key = query · scale(query), add the gradients of keys to those of queries:
// dq += scale · (dk − query · (query · dk) / (d · (mean(query²) + 1e-6))).
void finish_backward(const Problem& p, const Shape& s, int64_t row, int64_t begin) {
    const char* q_row = row_of(p.q, row, p.heads);
    Buffer<float> query(s.wide);
    for (int64_t position = begin; position < std::min<int64_t>(begin + PIECE, p.length); ++position) {
        fetch(query, p.q, q_row, position);
        const Unit unit(query, s.d);
        const float* dk = floats_at(p.dk, row, p.heads, position);
        float* dq = floats_at(p.dq, row, p.heads, position);
        const float along = dot(query, dk, s.d) * unit.inverse / s.d;
        for (int c = 0; c < s.d; ++c) dq[c] += unit.scale * (dk[c] - query[c] * along);
    }
}

// Add a phase whose tasks are the `pieces` pieces (or strips) of each of the rows from `first_row` on.
void add_phase(std::vector<Phase<Scratch>>& phases, int64_t first_row, int64_t rows, int64_t pieces,
               std::function<void(int64_t, int64_t, Scratch&)> run) {
    if (pieces > 0)
        phases.push_back({rows * pieces, [=](int64_t task, Scratch& scratch) {
                              run(first_row + task / pieces, task % pieces, scratch);
                          }});
}

}  // namespace

extern "C" {

void megabase_use_threads(void* parallel) { torch_threads = (Parallel)parallel; }

void megabase_hash(const Hashing* hashing) {
    const Hashing& h = *hashing;
    const int wide = round_up(h.x.width, PANEL);
    const int64_t pieces = (h.length + PIECE - 1) / PIECE;
    const std::vector<Phase<HashSpace>> phases{
        {(int64_t)h.batch * h.heads * pieces, [&](int64_t task, HashSpace& space) {
             hash_positions(h, wide, task / pieces, task % pieces * PIECE, space);
         }}};
    run_phases(h.threads, phases, wide);
}

void megabase_sort(const Sorting* sorting) {
    const Sorting& s = *sorting;
    const std::vector<Phase<SortSpace>> phases{
        {(int64_t)s.rows * s.rounds, [&](int64_t task, SortSpace& space) { sort_positions(s, task, space); }}};
    run_phases(s.threads, phases, s.n_buckets);
}

void megabase_forward(const Problem* problem) {
    const Problem& p = *problem;
    const Shape s(p);
    const Cut cut(p, s);
    std::vector<Phase<Scratch>> phases;
    for (int64_t row = 0; row < cut.rows; row += cut.step) {
        const int64_t some = std::min(cut.step, cut.rows - row);
        for (int round = 0; round < p.rounds; ++round)
            add_phase(phases, row, some, cut.strips, [&p, &s, round](int64_t row, int64_t strip, Scratch& x) {
                Strip<false>(p, s, x, row, round, strip * s.strip, false).run();
                if (!p.window && strip == 0) Strip<false>(p, s, x, row, round, 0, true).run();
            });
        add_phase(phases, row, some, cut.pieces,
                  [&p, &s](int64_t row, int64_t piece, Scratch&) { finish_forward(p, s, row, piece * PIECE); });
    }
    run_phases(p.threads, phases, p, s, false);
}

void megabase_backward(const Problem* problem) {
    const Problem& p = *problem;
    const Shape s(p);
    const Cut cut(p, s);
    std::vector<Phase<Scratch>> phases;
    for (int64_t row = 0; row < cut.rows; row += cut.step) {
        const int64_t some = std::min(cut.step, cut.rows - row);
        add_phase(phases, row, some, cut.pieces,
                  [&p, &s](int64_t row, int64_t piece, Scratch&) { begin_backward(p, s, row, piece * PIECE); });
        for (int round = 0; round < p.rounds; ++round) {
            for (int parity = 0; parity < 2; ++parity)
                add_phase(phases, row, some, (cut.strips + 1 - parity) / 2,
                          [&p, &s, round, parity](int64_t row, int64_t pair, Scratch& x) {
                              Strip<true>(p, s, x, row, round, (2 * pair + parity) * s.strip, false).run();
                          });
            if (!p.window)
                add_phase(phases, row, some, 1, [&p, &s, round](int64_t row, int64_t, Scratch& x) {
                    Strip<true>(p, s, x, row, round, 0, true).run();
                });
        }
        if (!p.k.data)
            add_phase(phases, row, some, cut.pieces,
                      [&p, &s](int64_t row, int64_t piece, Scratch&) { finish_backward(p, s, row, piece * PIECE); });
    }
    run_phases(p.threads, phases, p, s, true);
}

}  // extern "C"
