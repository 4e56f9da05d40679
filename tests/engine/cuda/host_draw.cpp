// Sampling: the kernel's own sources, compiled for the CPU and called through ctypes. A team consists of std::threads,
// so the row algorithm runs with the same barriers and merges as on a GPU.
#include <barrier>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "row.h"

namespace {

class HostTeam {
 public:
  HostTeam(std::vector<llumd::Shared>& shared, std::vector<std::barrier<>*>& barriers, std::barrier<>& all,
           uint32_t block, uint32_t thread, uint32_t threads)
      : shared_(shared), barriers_(barriers), all_(all), block_(block), thread_(thread), threads_(threads) {}

  uint32_t thread() const { return thread_; }
  uint32_t threads() const { return threads_; }
  uint32_t block() const { return block_; }
  uint32_t blocks() const { return static_cast<uint32_t>(shared_.size()); }
  llumd::Shared& own() const { return shared_[block_]; }
  llumd::Shared& shared(uint32_t block) const { return shared_[block]; }
  void sync() const { barriers_[block_]->arrive_and_wait(); }
  void sync_all() const { all_.arrive_and_wait(); }
  void add(uint32_t* word, uint32_t amount) const { __atomic_fetch_add(word, amount, __ATOMIC_RELAXED); }
  uint32_t warp() const { return thread_; }
  uint32_t warps() const { return threads_; }
  bool leads_warp() const { return true; }
  template <class T>
  T warp_max(T x) const {
    return x;
  }

 private:
  std::vector<llumd::Shared>& shared_;
  std::vector<std::barrier<>*>& barriers_;
  std::barrier<>& all_;
  uint32_t block_, thread_, threads_;
};

int32_t draw_row(const float* row, uint32_t vocab, const llumd::RowParams& params, uint32_t blocks,
                 uint32_t threads) {
  std::vector<llumd::Shared> shared(blocks);
  std::memset(shared.data(), 0xA5, shared.size() * sizeof(llumd::Shared));  // a GPU does not clear it either
  std::barrier<> all(blocks * threads);
  std::vector<std::barrier<>*> barriers;
  for (uint32_t b = 0; b < blocks; ++b) barriers.push_back(new std::barrier<>(threads));
  std::vector<int32_t> tokens(blocks * threads);
  const auto work = [&](uint32_t block, uint32_t thread) {
    HostTeam team(shared, barriers, all, block, thread, threads);
    const llumd::Slice slice = llumd::slice_of(row, vocab, block, blocks);
    tokens[block * threads + thread] = llumd::draw_row(team, slice, params, vocab);
  };
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < blocks * threads; ++i) others.emplace_back(work, i / threads, i % threads);
  work(0, 0);
  for (auto& other : others) other.join();
  for (auto* barrier : barriers) delete barrier;
  for (const int32_t token : tokens)
    if (token != tokens[0]) std::abort();  // every thread must return the same token
  return tokens[0];
}

}  // namespace

extern "C" {

void words(uint64_t seed, uint32_t position, uint32_t stream, const int32_t* tokens, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::word_of(position, static_cast<uint32_t>(tokens[i]), stream, seed);
}

void gumbels(const uint32_t* words, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::gumbel(words[i]);
}

void weights(const float* x, int64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::weight(x[i]);
}

void orders(const float* x, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::order_of(x[i]);
}

void largest_words(const float* gaps, uint32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::largest_word(gaps[i]);
}

void nucleus_targets(const int64_t* totals, const double* top_p, int64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::nucleus_target(totals[i], top_p[i]);
}

void draw_rows(const float* logits, int64_t rows, int64_t vocab, const float* inverse_temperature,
               const float* min_p_depth, const int32_t* top_k, const double* top_p, const int64_t* seed,
               const int32_t* position, int32_t* out, uint32_t blocks, uint32_t threads) {
  for (int64_t i = 0; i < rows; ++i) {
    const llumd::RowParams params{inverse_temperature[i], min_p_depth[i], top_k[i], top_p[i],
                                  static_cast<uint64_t>(seed[i]), static_cast<uint32_t>(position[i])};
    out[i] = draw_row(logits + i * vocab, static_cast<uint32_t>(vocab), params, blocks, threads);
  }
}
}
