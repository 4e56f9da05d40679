// The product of a few rows with a large matrix (with one row: a GEMV) by a team of threads, fused with the operations
// around it.
//
// One row reads as many bytes of weights as a full batch, so a step takes as long as the memory needs, and the time
// between two products is added to that. So each product includes its norm, bias, rotation, SiLU or residual, and its
// first weights are in flight before the previous kernel has ended.
//
// A warp takes pairs of the matrix's rows, `Task`s, one after the other: the two rows of a rotation, a gate and its up,
// or any two rows. Its lanes take groups of eight columns in turn, and always have the next piece in flight while they
// add up the current one. The rows to multiply are in the block's shared memory. All code here runs in every thread. A
// `Team` has:
//
//   thread(), threads()      index in the block, and number of threads
//   block(), blocks()        index of the block, and number of blocks
//   warp(), warps()          index of the thread's warp in the block, and number of warps
//   lane(), lanes()          index in the warp, and number of lanes
//   sync()                   barrier of the block; makes writes to its shared memory visible
//   sum(x)                   float: the sum over the warp, in all its threads; all of them must call it
//   fetch(p)                 the Eight at p, which no thread writes and which is read only once
//   prefetch(p, n)           prefetches n Eights at p, which no thread writes, into the L2 cache
//   await()                  waits until all writes of the previous kernels are visible
#pragma once

#include "pages.h"

namespace llumd {

constexpr uint32_t PIECE = 4;              // Eights of each row of a task that a lane has in flight
constexpr uint32_t PREFETCHED_PIECES = 3;  // pieces after the first one that are prefetched from the start
constexpr uint32_t KEEPING = 8;            // Eights of the rows to multiply that a thread has in flight
constexpr uint32_t MOST_WARPS = 32;
constexpr uint32_t NO_ROW = 0xFFFFFFFFu;

// ---- Operands

// M rows of `width` bfloat16, `stride` apart. With `norm`, `width` weights, their RMSNorm is multiplied instead.
struct Rows {
  const Bf16* x;
  int64_t stride;
  uint32_t width;  // a multiple of EIGHT
  const Bf16* norm;
  float eps;

  LLUMD_BOTH uint32_t groups() const { return width / EIGHT; }
  LLUMD_BOTH const Eight* row(uint32_t m) const { return reinterpret_cast<const Eight*>(x + m * stride); }
};

// A contiguous matrix [rows, width], and a bias [rows] or nullptr.
struct Matrix {
  const Bf16* weight;
  const Bf16* bias;

  LLUMD_BOTH const Eight* row(uint32_t n, uint32_t groups) const {
    return reinterpret_cast<const Eight*>(weight) + static_cast<int64_t>(n) * groups;
  }
  LLUMD_BOTH float bias_of(uint32_t n) const { return bias ? of_bf16(bias[n]) : 0.0f; }
};

// `count` Eights from `at` to prefetch: no kernel writes them, and the next kernels read them. `count` may be 0.
struct NextWeights {
  const Eight* at;
  uint64_t count;
};

struct Task {
  uint32_t first;
  uint32_t second;  // or NO_ROW
};

// ---- Epilogues: which rows of the matrix form a task, and where their sums go. `store` gets the sums a and b of row
// m, with the bias.

// Tasks of any two rows, which are independent.
struct Each {
  uint32_t rows;

  LLUMD_BOTH uint32_t tasks() const { return (rows + 1) / 2; }
  LLUMD_BOTH Task task(uint32_t t) const { return {t, t + tasks() < rows ? t + tasks() : NO_ROW}; }
};

// residual[m, n] += the sum of row n.
struct Add : Each {
  Bf16* residual;
  int64_t stride;

  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    Bf16* const row = residual + m * stride;
    const bool both = task.second != NO_ROW;
    const Bf16 first = row[task.first], second = both ? row[task.second] : first;  // both loads are in flight together
    row[task.first] = to_bf16(of_bf16(first) + a);
    if (both) row[task.second] = to_bf16(of_bf16(second) + b);
  }
};

// out[m, n] = silu(sum of row n) * sum of row (width + n).
struct Gate {
  Bf16* out;
  int64_t stride;
  uint32_t width;

  LLUMD_BOTH uint32_t tasks() const { return width; }
  LLUMD_BOTH Task task(uint32_t t) const { return {t, t + width}; }
  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    out[m * stride + task.first] = to_bf16(a / (1.0f + expf(-a)) * b);
  }
};

// out[m, n] = the sum of row n, as float32.
struct Logits : Each {
  float* out;
  int64_t stride;

  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    out[m * stride + task.first] = a;
    if (task.second != NO_ROW) out[m * stride + task.second] = b;
  }
};

// The fused product of query, key and value: queries, rotated, go to q [M, heads, 2 half]; keys, rotated, and values go
// to the pool. Each task is the two columns of a head that are rotated together.
template <class Entry>
struct Heads {
  Bf16* q;
  Entry* keys;
  Entry* values;
  Pages pages;
  const int32_t* positions;
  const float* angles;  // [max_len, 2 half]: cosines, then sines
  uint32_t heads;
  uint32_t kv_heads;
  uint32_t half;  // of a head's width

  LLUMD_BOTH uint32_t tasks() const { return (heads + 2 * kv_heads) * half; }
  LLUMD_BOTH Task task(uint32_t t) const {
    const uint32_t first = t / half * 2 * half + t % half;
    return {first, first + half};
  }
  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    const uint32_t head = task.first / (2 * half), i = task.first % (2 * half);
    const uint32_t position = static_cast<uint32_t>(positions[m]);
    if (head >= heads + kv_heads) return put(values + pages.place(m, position, head - heads - kv_heads), i, a, b);
    const float* rotation = angles + static_cast<int64_t>(position) * 2 * half + i;
    rotate(a, b, rotation[0], rotation[half]);
    if (head >= heads) return put(keys + pages.place(m, position, head - heads), i, a, b);
    put(q + (static_cast<int64_t>(m) * heads + head) * 2 * half, i, a, b);
  }

 private:
  LLUMD_BOTH void put(Bf16* at, uint32_t i, float low, float high) const {
    at[i] = to_bf16(low);
    at[i + half] = to_bf16(high);
  }
  LLUMD_BOTH void put(uint8_t* at, uint32_t i, float low, float high) const {
    at[i] = to_e4m3(low);
    at[i + half] = to_e4m3(high);
  }
};

// ---- The rows in the block's shared memory

template <uint32_t M>
struct Scales {
  float of_warp[MOST_WARPS][M];
};

LLUMD_BOTH float squares(Eight e) {
  float sum = 0.0f;
  for (uint32_t j = 0; j < EIGHT / 2; ++j)
    sum += even_of(e.pair[j]) * even_of(e.pair[j]) + odd_of(e.pair[j]) * odd_of(e.pair[j]);
  return sum;
}

LLUMD_BOTH Eight scaled(Eight e, Eight weight, float by) {
  for (uint32_t j = 0; j < EIGHT / 2; ++j) {
    const uint32_t low = to_bf16(even_of(e.pair[j]) * by * even_of(weight.pair[j]));
    const uint32_t high = to_bf16(odd_of(e.pair[j]) * by * odd_of(weight.pair[j]));
    e.pair[j] = low | high << 16;
  }
  return e;
}

// Number of groups of M rows that a thread has in flight: those at `first`, `first` + threads, ...
template <uint32_t M>
constexpr uint32_t SPAN = KEEPING / M;

// Copies a span of the rows to `kept` [M, groups].
template <uint32_t M, class Team>
LLUMD_BOTH void copy(Team& team, const Rows& rows, uint32_t first, Eight* kept) {
  const uint32_t groups = rows.groups();
  Eight x[SPAN<M>][M];
  LLUMD_UNROLL
  for (uint32_t i = 0; i < SPAN<M>; ++i) {
    const uint32_t g = first + i * team.threads();
    LLUMD_UNROLL
    for (uint32_t m = 0; m < M; ++m) x[i][m] = g < groups ? rows.row(m)[g] : Eight{};
  }
  LLUMD_UNROLL
  for (uint32_t i = 0; i < SPAN<M>; ++i) {
    const uint32_t g = first + i * team.threads();
    if (g >= groups) continue;
    LLUMD_UNROLL
    for (uint32_t m = 0; m < M; ++m) kept[m * groups + g] = x[i][m];
  }
}

// Computes 1 / root mean square of each row, in every thread, from `kept`.
template <uint32_t M, class Team>
LLUMD_BOTH void scales(Team& team, const Rows& rows, const Eight* kept, Scales<M>& shared, float (&by)[M]) {
  const uint32_t groups = rows.groups();
  LLUMD_UNROLL
  for (uint32_t m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (uint32_t g = team.thread(); g < groups; g += team.threads()) sum += squares(kept[m * groups + g]);
    sum = team.sum(sum);
    if (team.lane() == 0) shared.of_warp[team.warp()][m] = sum;
  }
  team.sync();
  LLUMD_UNROLL
  for (uint32_t m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < team.warps(); ++w) sum += shared.of_warp[w][m];
    by[m] = 1.0f / sqrtf(sum / static_cast<float>(rows.width) + rows.eps);
  }
}

// Loads a span of the norm's weights.
template <uint32_t M, class Team>
LLUMD_BOTH void weights(Team& team, const Rows& rows, uint32_t first, Eight (&weight)[SPAN<M>]) {
  LLUMD_UNROLL
  for (uint32_t i = 0; i < SPAN<M>; ++i) {
    const uint32_t g = first + i * team.threads();
    weight[i] = g < rows.groups() ? reinterpret_cast<const Eight*>(rows.norm)[g] : Eight{};
  }
}

// Normalises a span of `kept`. Each thread normalises the entries that it has copied.
template <uint32_t M, class Team>
LLUMD_BOTH void scale(Team& team, uint32_t groups, uint32_t first, const Eight (&weight)[SPAN<M>], const float (&by)[M],
                      Eight* kept) {
  LLUMD_UNROLL
  for (uint32_t i = 0; i < SPAN<M>; ++i) {
    const uint32_t g = first + i * team.threads();
    if (g >= groups) continue;
    LLUMD_UNROLL
    for (uint32_t m = 0; m < M; ++m) kept[m * groups + g] = scaled(kept[m * groups + g], weight[i], by[m]);
  }
}

template <uint32_t M, class Team>
LLUMD_BOTH void normalise(Team& team, const Rows& rows, Scales<M>& shared, Eight* kept) {
  const uint32_t stride = SPAN<M> * team.threads();
  Eight weight[SPAN<M>];
  weights<M>(team, rows, team.thread(), weight);  // in flight while the squares are added up
  float by[M];
  scales<M>(team, rows, kept, shared, by);
  scale<M>(team, rows.groups(), team.thread(), weight, by, kept);
  for (uint32_t g = team.thread() + stride; g < rows.groups(); g += stride) {
    weights<M>(team, rows, g, weight);
    scale<M>(team, rows.groups(), g, weight, by, kept);
  }
}

// Writes the rows, normalised if there is a norm, to `kept` [M, groups].
template <uint32_t M, class Team>
LLUMD_BOTH void keep(Team& team, const Rows& rows, Scales<M>& shared, Eight* kept) {
  const uint32_t stride = SPAN<M> * team.threads();
  copy<M>(team, rows, team.thread(), kept);  // outside the loop: at a loop the GPU waits for all loads in flight
  for (uint32_t g = team.thread() + stride; g < rows.groups(); g += stride) copy<M>(team, rows, g, kept);
  if (rows.norm) normalise<M>(team, rows, shared, kept);
  team.sync();
}

// ---- The product

// A lane's part of the two rows of a task: Eights `at`, `at` + lanes, ...; zeros past their end.
struct Piece {
  Eight a[PIECE];
  Eight b[PIECE];
};

// The progress of a warp in its tasks.
struct Cursor {
  uint32_t task;
  uint32_t at;  // first group of the next piece, of lane 0
};

template <class Team>
LLUMD_BOTH Eight group_of(Team& team, const Matrix& matrix, uint32_t row, uint32_t g, uint32_t groups) {
  return g < groups && row != NO_ROW ? team.fetch(matrix.row(row, groups) + g) : Eight{};
}

template <class Team, class Epilogue>
LLUMD_BOTH void fetch(Team& team, const Matrix& matrix, const Epilogue& epilogue, Cursor cursor, uint32_t groups,
                      Piece& piece) {
  if (cursor.task >= epilogue.tasks()) return;
  const Task task = epilogue.task(cursor.task);
  LLUMD_UNROLL
  for (uint32_t u = 0; u < PIECE; ++u) {
    const uint32_t g = cursor.at + u * team.lanes() + team.lane();
    piece.a[u] = group_of(team, matrix, task.first, g, groups);
    piece.b[u] = group_of(team, matrix, task.second, g, groups);
  }
}

LLUMD_BOTH float dot(Eight w, Eight x, float sum) {
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j) {
    sum += even_of(w.pair[j]) * even_of(x.pair[j]);
    sum += odd_of(w.pair[j]) * odd_of(x.pair[j]);
  }
  return sum;
}

template <uint32_t M>
struct Sums {
  float a[M];
  float b[M];
};

template <uint32_t M, class Team>
LLUMD_BOTH void add_up(Team& team, const Piece& piece, const Eight* kept, uint32_t at, uint32_t groups,
                       Sums<M>& sums) {
  LLUMD_UNROLL
  for (uint32_t u = 0; u < PIECE; ++u) {
    const uint32_t g = at + u * team.lanes() + team.lane();
    if (g >= groups) return;
    LLUMD_UNROLL
    for (uint32_t m = 0; m < M; ++m) {
      const Eight x = kept[m * groups + g];
      sums.a[m] = dot(piece.a[u], x, sums.a[m]);
      sums.b[m] = dot(piece.b[u], x, sums.b[m]);
    }
  }
}

// Stores the sums of each row by the epilogue: lane m stores row m, so all rows at the same time if there are enough
// lanes.
template <uint32_t M, class Team, class Epilogue>
LLUMD_BOTH void finish(Team& team, const Matrix& matrix, const Epilogue& epilogue, uint32_t at, Sums<M>& sums) {
  const Task task = epilogue.task(at);
  const float first = matrix.bias_of(task.first);
  const float second = task.second == NO_ROW ? 0.0f : matrix.bias_of(task.second);
  LLUMD_UNROLL
  for (uint32_t m = 0; m < M; ++m) {
    sums.a[m] = team.sum(sums.a[m]);
    sums.b[m] = team.sum(sums.b[m]);
  }
  for (uint32_t m = team.lane(); m < M; m += team.lanes()) {
    float a = sums.a[0], b = sums.b[0];
    LLUMD_UNROLL
    for (uint32_t i = 1; i < M; ++i) {  // a dynamic index would put the sums into local memory
      a = m == i ? sums.a[i] : a;
      b = m == i ? sums.b[i] : b;
    }
    epilogue.store(task, m, a + first, b + second);
  }
  sums = {};
}

// Prefetches what a warp reads after its first piece, before the rows are ready. One lane does it.
template <class Team, class Epilogue>
LLUMD_BOTH void prefetch(Team& team, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue, uint32_t at) {
  if (team.lane() != 0) return;
  if (rows.norm && team.block() == 0 && team.warp() == 0)
    team.prefetch(reinterpret_cast<const Eight*>(rows.norm), rows.groups());
  const uint32_t groups = rows.groups(), piece = PIECE * team.lanes();
  if (at >= epilogue.tasks() || groups <= piece) return;
  const uint32_t count = groups - piece < PREFETCHED_PIECES * piece ? groups - piece : PREFETCHED_PIECES * piece;
  const Task task = epilogue.task(at);
  team.prefetch(matrix.row(task.first, groups) + piece, count);
  if (task.second != NO_ROW) team.prefetch(matrix.row(task.second, groups) + piece, count);
}

// Prefetches a warp's share of the next weights. The warp has nothing left to read, so the memory works while others
// compute.
template <class Team>
LLUMD_BOTH void prefetch(Team& team, const NextWeights& next_weights) {
  if (team.lane() != 0) return;
  const uint64_t warps = static_cast<uint64_t>(team.blocks()) * team.warps();
  const uint64_t share = (next_weights.count + warps - 1) / warps;
  const uint64_t first = share * (team.block() * team.warps() + team.warp());
  if (first >= next_weights.count) return;
  const uint64_t left = next_weights.count - first;
  team.prefetch(next_weights.at + first, static_cast<uint32_t>(left < share ? left : share));
}

// Computes the whole product. `kept`: shared memory for M rows.
template <uint32_t M, class Team, class Epilogue>
LLUMD_BOTH void multiply(Team& team, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue,
                         const NextWeights& next_weights, Scales<M>& shared, Eight* kept) {
  const uint32_t groups = rows.groups(), stride = team.blocks() * team.warps();
  Cursor cursor{team.block() * team.warps() + team.warp(), 0};
  Piece next{};
  fetch(team, matrix, epilogue, cursor, groups, next);  // needs nothing of the previous kernels
  prefetch(team, rows, matrix, epilogue, cursor.task);
  team.await();
  keep<M>(team, rows, shared, kept);
  Sums<M> sums{};
  while (cursor.task < epilogue.tasks()) {
    const Piece piece = next;
    const Cursor here = cursor;
    cursor.at += PIECE * team.lanes();
    if (cursor.at >= groups) cursor = {here.task + stride, 0};
    fetch(team, matrix, epilogue, cursor, groups, next);
    add_up<M>(team, piece, kept, here.at, groups, sums);
    if (cursor.at == 0) finish<M>(team, matrix, epilogue, here.task, sums);
  }
  prefetch(team, next_weights);
}

}  // namespace llumd
