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
//   await()                  until all that the kernels in front have written is there
#pragma once

#include "pages.h"

namespace llumd {

constexpr uint32_t PIECE = 4;    // Eights of each row of a task that a lane has under way
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
    add(residual + m * stride + task.first, a);
    if (task.second != NO_ROW) add(residual + m * stride + task.second, b);
  }

 private:
  LLUMD_BOTH static void add(Bf16* at, float x) { *at = to_bf16(of_bf16(*at) + x); }
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

// 1 / root mean square of each row, in every thread of the block.
template <uint32_t M, class Team>
LLUMD_BOTH void scales(Team& team, const Rows& rows, Scales<M>& shared, float (&by)[M]) {
  for (uint32_t m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (uint32_t g = team.thread(); g < rows.groups(); g += team.threads()) sum += squares(rows.row(m)[g]);
    sum = team.sum(sum);
    if (team.lane() == 0) shared.of_warp[team.warp()][m] = sum;
  }
  team.sync();
  for (uint32_t m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (uint32_t w = 0; w < team.warps(); ++w) sum += shared.of_warp[w][m];
    by[m] = 1.0f / sqrtf(sum / static_cast<float>(rows.width) + rows.eps);
  }
}

// Puts the rows, normalised if so wished, into `kept` [M, groups].
template <uint32_t M, class Team>
LLUMD_BOTH void keep(Team& team, const Rows& rows, Scales<M>& shared, Eight* kept) {
  float by[M];
  if (rows.norm) scales<M>(team, rows, shared, by);
  const Eight* norm = reinterpret_cast<const Eight*>(rows.norm);
  for (uint32_t m = 0; m < M; ++m)
    for (uint32_t g = team.thread(); g < rows.groups(); g += team.threads())
      kept[m * rows.groups() + g] = norm ? scaled(rows.row(m)[g], norm[g], by[m]) : rows.row(m)[g];
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

// Each row's sums go to its epilogue, row m by lane m.
template <uint32_t M, class Team, class Epilogue>
LLUMD_BOTH void finish(Team& team, const Matrix& matrix, const Epilogue& epilogue, uint32_t at, Sums<M>& sums) {
  const Task task = epilogue.task(at);
  const float first = matrix.bias_of(task.first);
  const float second = task.second == NO_ROW ? 0.0f : matrix.bias_of(task.second);
  LLUMD_UNROLL
  for (uint32_t m = 0; m < M; ++m) {
    const float a = team.sum(sums.a[m]), b = team.sum(sums.b[m]);
    if (team.lane() == m % team.lanes()) epilogue.store(task, m, a + first, b + second);
    sums.a[m] = sums.b[m] = 0.0f;
  }
}

// The whole product. `kept`: room for M rows in the block's memory.
template <uint32_t M, class Team, class Epilogue>
LLUMD_BOTH void multiply(Team& team, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue,
                         Scales<M>& shared, Eight* kept) {
  const uint32_t groups = rows.groups(), stride = team.blocks() * team.warps();
  Cursor cursor{team.block() * team.warps() + team.warp(), 0};
  Piece next{};
  fetch(team, matrix, epilogue, cursor, groups, next);  // weights are there from the start
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
}

}  // namespace llumd
