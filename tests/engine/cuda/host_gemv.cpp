// Small-batch products: the kernels' own source, compiled for the CPU and called through ctypes. Threads replace lanes,
// with the same pieces, sums and barriers as on a GPU.
#include <barrier>
#include <thread>
#include <vector>

#include "gemv.h"

namespace {

struct Shape {
  uint32_t blocks, warps, lanes;
};

struct Block {
  std::barrier<> barrier;
  std::vector<float> values;  // of each thread
  std::vector<std::barrier<>*> warps;

  explicit Block(Shape shape) : barrier(shape.warps * shape.lanes), values(shape.warps * shape.lanes) {
    for (uint32_t w = 0; w < shape.warps; ++w) warps.push_back(new std::barrier<>(shape.lanes));
  }
  ~Block() {
    for (auto* warp : warps) delete warp;
  }
};

class HostTeam {
 public:
  HostTeam(Block& shared, Shape shape, uint32_t block, uint32_t thread)
      : shared_(shared), shape_(shape), block_(block), thread_(thread) {}

  uint32_t thread() const { return thread_; }
  uint32_t threads() const { return shape_.warps * shape_.lanes; }
  uint32_t block() const { return block_; }
  uint32_t blocks() const { return shape_.blocks; }
  uint32_t warp() const { return thread_ / shape_.lanes; }
  uint32_t warps() const { return shape_.warps; }
  uint32_t lane() const { return thread_ % shape_.lanes; }
  uint32_t lanes() const { return shape_.lanes; }
  void sync() const { shared_.barrier.arrive_and_wait(); }
  void await() const {}
  llumd::Eight fetch(const llumd::Eight* at) const { return *at; }
  void prefetch(const llumd::Eight* at, uint32_t count) const {
    for (uint32_t i = 0; i < count; ++i) static_cast<void>(*reinterpret_cast<const volatile uint32_t*>(at + i));
  }

  float sum(float x) const {
    if (shape_.lanes == 1) return x;
    auto& warp = *shared_.warps[this->warp()];
    shared_.values[thread_] = x;
    warp.arrive_and_wait();
    float total = 0.0f;
    for (uint32_t lane = 0; lane < shape_.lanes; ++lane) total += shared_.values[this->warp() * shape_.lanes + lane];
    warp.arrive_and_wait();
    return total;
  }

 private:
  Block& shared_;
  Shape shape_;
  uint32_t block_, thread_;
};

// A team that counts what it is asked to prefetch.
struct CountingTeam {
  Shape shape;
  uint32_t block_, thread_;
  const llumd::Eight* from;
  uint32_t* times;

  uint32_t block() const { return block_; }
  uint32_t blocks() const { return shape.blocks; }
  uint32_t warp() const { return thread_ / shape.lanes; }
  uint32_t warps() const { return shape.warps; }
  uint32_t lane() const { return thread_ % shape.lanes; }
  void prefetch(const llumd::Eight* at, uint32_t count) const {
    for (uint32_t i = 0; i < count; ++i) ++times[at + i - from];
  }
};

template <uint32_t M, class Epilogue>
void run_block(Shape shape, uint32_t block, const llumd::Rows& rows, const llumd::Matrix& matrix,
               const Epilogue& epilogue, const llumd::NextWeights& next_weights) {
  Block shared(shape);
  llumd::Scales<M> scales;
  std::memset(&scales, 0xA5, sizeof scales);  // a GPU does not clear it either
  std::vector<llumd::Eight> kept(M * rows.groups());
  const auto work = [&](uint32_t thread) {
    HostTeam team(shared, shape, block, thread);
    llumd::multiply<M>(team, rows, matrix, epilogue, next_weights, scales, kept.data());
  };
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < shape.warps * shape.lanes; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
}

template <class Epilogue>
void run(Shape shape, uint32_t count, const llumd::Rows& rows, const llumd::Matrix& matrix, const Epilogue& epilogue,
         const llumd::NextWeights& next_weights = {}) {
  for (uint32_t block = 0; block < shape.blocks; ++block) switch (count) {
      case 1: run_block<1>(shape, block, rows, matrix, epilogue, next_weights); break;
      case 2: run_block<2>(shape, block, rows, matrix, epilogue, next_weights); break;
      case 3: run_block<3>(shape, block, rows, matrix, epilogue, next_weights); break;
      case 4: run_block<4>(shape, block, rows, matrix, epilogue, next_weights); break;
      default: std::abort();
    }
}

}  // namespace

extern "C" {

// The first arguments of every function: the team, the number of rows, the rows, the matrix.
#define PRODUCT Shape shape, uint32_t count, llumd::Rows rows, llumd::Matrix matrix

void add(PRODUCT, llumd::Bf16* residual, int64_t stride, uint32_t columns) {
  run(shape, count, rows, matrix, llumd::Add{{columns}, residual, stride});
}

void gate(PRODUCT, llumd::Bf16* out, int64_t stride, uint32_t width) {
  run(shape, count, rows, matrix, llumd::Gate{out, stride, width});
}

void logits(PRODUCT, float* out, int64_t stride, uint32_t columns) {
  run(shape, count, rows, matrix, llumd::Logits{{columns}, out, stride});
}

void heads(PRODUCT, llumd::Bf16* q, void* keys, void* values, llumd::Pages pages, const int32_t* positions,
           const float* angles, uint32_t heads, uint32_t kv_heads, uint32_t half, bool e4m3,
           llumd::NextWeights next_weights) {
  if (e4m3)
    run(shape, count, rows, matrix,
        llumd::Heads<uint8_t>{q, static_cast<uint8_t*>(keys), static_cast<uint8_t*>(values), pages, positions, angles,
                              heads, kv_heads, half},
        next_weights);
  else
    run(shape, count, rows, matrix,
        llumd::Heads<llumd::Bf16>{q, static_cast<llumd::Bf16*>(keys), static_cast<llumd::Bf16*>(values), pages,
                                  positions, angles, heads, kv_heads, half},
        next_weights);
}

// Counts how often the whole team prefetches each Eight of `next_weights`.
void count_prefetches(Shape shape, llumd::NextWeights next_weights, uint32_t* times) {
  for (uint32_t block = 0; block < shape.blocks; ++block)
    for (uint32_t thread = 0; thread < shape.warps * shape.lanes; ++thread) {
      CountingTeam team{shape, block, thread, next_weights.at, times};
      llumd::prefetch(team, next_weights);
    }
}

void to_bf16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::to_bf16(x[i]);
}

void to_e4m3(const float* x, uint8_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = llumd::to_e4m3(x[i]);
}
}
