// How a team of threads multiplies a few rows with a large matrix (a GEMV, at one row), and what it does beside that.
//
// One row reads as many bytes of weights as a full batch, so a step takes as long as the memory does, and whatever
// stands between two products comes on top. Hence each product takes its norm, bias, rotation, SiLU or residual along,
// and its first weights are on their way before the kernel in front of it has ended.
//
// A warp takes pairs of the matrix's rows, `Task`s, in turn: the two of a rotation, a gate and its up, or simply two.
// Its lanes take groups of eight columns in turn and always have the next piece under way while they add up one. The
// rows to be multiplied lie in the block's memory. All code here runs in every thread; what a `Team` offers:
//
//   thread(), threads()      index in the block, and how many
//   block(), blocks()        index of the block, and how many
//   warp(), warps()          index of the thread's warp in the block, and how many
//   lane(), lanes()          index in the warp, and how many
//   sync()                   barrier of the block; makes writes to its memory visible
//   sum(x)                   float: the sum over the warp, in all its threads, which must all come
//   fetch(p)                 the Eight at p, which nobody writes and nobody reads again
//   warm(p, n)               has n Eights at p, which nobody writes, on their way into the device's cache
//   await()                  until all that the kernels in front have written is there
#pragma once

#include "pages.h"

namespace llumd {

constexpr uint32_t PIECE = 4;    // Eights of each row of a task that a lane has under way
constexpr uint32_t AHEAD = 3;    // pieces behind the first that are on their way into the cache from the start
constexpr uint32_t KEEPING = 8;  // Eights of the rows to be multiplied that a thread has under way
constexpr uint32_t MOST_WARPS = 32;
constexpr uint32_t NO_ROW = 0xFFFFFFFFu;

// ---- What is multiplied

// M rows of `width` bfloat16, `stride` apart; with `norm`, that many weights, their RMSNorm in place of them.
struct Rows {
  const Bf16* x;
  int64_t stride;
  uint32_t width;  // a multiple of EIGHT
  const Bf16* norm;
  float eps;

  LLUMD_BOTH uint32_t groups() const { return width / EIGHT; }
  LLUMD_BOTH const Eight* row(uint32_t m) const { return reinterpret_cast<const Eight*>(x + m * stride); }
};

// [rows, width] without gaps, and a bias [rows] or none.
struct Matrix {
  const Bf16* weight;
  const Bf16* bias;

  LLUMD_BOTH const Eight* row(uint32_t n, uint32_t groups) const {
    return reinterpret_cast<const Eight*>(weight) + static_cast<int64_t>(n) * groups;
  }
  LLUMD_BOTH float bias_of(uint32_t n) const { return bias ? of_bf16(bias[n]) : 0.0f; }
};

// `count` Eights from `at` that nobody writes and the kernels behind will read, or none.
struct Ahead {
  const Eight* at;
  uint64_t count;
};

struct Task {
  uint32_t first;
  uint32_t second;  // or NO_ROW
};

// ---- Epilogues: which rows belong together, and where their sums go. `store`: a and b are row m's, bias included.

// Any two rows, where each stands for itself.
struct Each {
  uint32_t rows;

  LLUMD_BOTH uint32_t tasks() const { return (rows + 1) / 2; }
  LLUMD_BOTH Task task(uint32_t t) const { return {t, t + tasks() < rows ? t + tasks() : NO_ROW}; }
};

// residual[m, n] += what row n gives.
struct Add : Each {
  Bf16* residual;
  int64_t stride;

  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    Bf16* const row = residual + m * stride;
    const bool both = task.second != NO_ROW;
    const Bf16 first = row[task.first], second = both ? row[task.second] : first;  // both on their way at a time
    row[task.first] = to_bf16(of_bf16(first) + a);
    if (both) row[task.second] = to_bf16(of_bf16(second) + b);
  }
};

// out[m, n] = silu(row n) * row width + n.
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

// out[m, n] = what row n gives, as float32.
struct Logits : Each {
  float* out;
  int64_t stride;

  LLUMD_BOTH void store(Task task, uint32_t m, float a, float b) const {
    out[m * stride + task.first] = a;
    if (task.second != NO_ROW) out[m * stride + task.second] = b;
  }
};

// The fused product of query, key and value: queries, rotated, to q [M, heads, 2 half]; keys, rotated, and values to
// the pool. Each task is two columns of a head that turn together.
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
    const float* turn = angles + static_cast<int64_t>(position) * 2 * half + i;
    rotate(a, b, turn[0], turn[half]);
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

// ---- The rows in the block's memory

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

// How many groups of M rows a thread has under way: those at `first`, `first` + threads, ...
template <uint32_t M>
constexpr uint32_t SPAN = KEEPING / M;

// A span of the rows goes into `kept` [M, groups].
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

// 1 / root mean square of each row, in every thread, from what each has kept.
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

// A span of the norm's weights.
template <uint32_t M, class Team>
LLUMD_BOTH void weights(Team& team, const Rows& rows, uint32_t first, Eight (&weight)[SPAN<M>]) {
  LLUMD_UNROLL
  for (uint32_t i = 0; i < SPAN<M>; ++i) {
    const uint32_t g = first + i * team.threads();
    weight[i] = g < rows.groups() ? reinterpret_cast<const Eight*>(rows.norm)[g] : Eight{};
  }
}

// A span of what is kept, normalised by the thread that put it there.
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
  weights<M>(team, rows, team.thread(), weight);  // on their way while the squares are added up
  float by[M];
  scales<M>(team, rows, kept, shared, by);
  scale<M>(team, rows.groups(), team.thread(), weight, by, kept);
  for (uint32_t g = team.thread() + stride; g < rows.groups(); g += stride) {
    weights<M>(team, rows, g, weight);
    scale<M>(team, rows.groups(), g, weight, by, kept);
  }
}

// Puts the rows, normalised if so wished, into `kept` [M, groups].
template <uint32_t M, class Team>
LLUMD_BOTH void keep(Team& team, const Rows& rows, Scales<M>& shared, Eight* kept) {
  const uint32_t stride = SPAN<M> * team.threads();
  copy<M>(team, rows, team.thread(), kept);  // not in the loop: at a loop a GPU waits for all that is under way
  for (uint32_t g = team.thread() + stride; g < rows.groups(); g += stride) copy<M>(team, rows, g, kept);
  if (rows.norm) normalise<M>(team, rows, shared, kept);
  team.sync();
}

// ---- The product

// What a lane has of a task's two rows: Eights `at`, `at` + lanes, ...; zeros past their end.
struct Piece {
  Eight a[PIECE];
  Eight b[PIECE];
};

// Where a warp is in its tasks.
struct Cursor {
  uint32_t task;
  uint32_t at;  // the first group of the lane's next piece, but for the lane
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

// Each row's sums go to its epilogue, row m by lane m: all rows at a time where there are so many lanes.
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
    for (uint32_t i = 1; i < M; ++i) {  // an index that is not known to the compiler would put the sums into memory
      a = m == i ? sums.a[i] : a;
      b = m == i ? sums.b[i] : b;
    }
    epilogue.store(task, m, a + first, b + second);
  }
  sums = {};
}

// What a warp reads after its first piece: on its way before anything is known of the rows. By one lane.
template <class Team, class Epilogue>
LLUMD_BOTH void warm(Team& team, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue, uint32_t at) {
  if (team.lane() != 0) return;
  if (rows.norm && team.block() == 0 && team.warp() == 0)
    team.warm(reinterpret_cast<const Eight*>(rows.norm), rows.groups());
  const uint32_t groups = rows.groups(), piece = PIECE * team.lanes();
  if (at >= epilogue.tasks() || groups <= piece) return;
  const uint32_t count = groups - piece < AHEAD * piece ? groups - piece : AHEAD * piece;
  const Task task = epilogue.task(at);
  team.warm(matrix.row(task.first, groups) + piece, count);
  if (task.second != NO_ROW) team.warm(matrix.row(task.second, groups) + piece, count);
}

// A warp's share of what comes next, for when it has nothing left to read: the memory goes on while others compute.
template <class Team>
LLUMD_BOTH void warm(Team& team, const Ahead& ahead) {
  if (team.lane() != 0) return;
  const uint64_t warps = static_cast<uint64_t>(team.blocks()) * team.warps();
  const uint64_t share = (ahead.count + warps - 1) / warps;
  const uint64_t first = share * (team.block() * team.warps() + team.warp());
  if (first >= ahead.count) return;
  const uint64_t left = ahead.count - first;
  team.warm(ahead.at + first, static_cast<uint32_t>(left < share ? left : share));
}

// The whole product. `kept`: room for M rows in the block's memory.
template <uint32_t M, class Team, class Epilogue>
LLUMD_BOTH void multiply(Team& team, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue,
                         const Ahead& ahead, Scales<M>& shared, Eight* kept) {
  const uint32_t groups = rows.groups(), stride = team.blocks() * team.warps();
  Cursor cursor{team.block() * team.warps() + team.warp(), 0};
  Piece next{};
  fetch(team, matrix, epilogue, cursor, groups, next);  // weights are there from the start
  warm(team, rows, matrix, epilogue, cursor.task);
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
  warm(team, ahead);
}

}  // namespace llumd
