// Products of a few rows with a matrix stored [out, in], for XLA on a CPU: y[R,O] = x[R,I] w[O,I]^T
// in float32, of bfloat16 or float32 operands.
//
// With few rows a product is as fast as its weights are read. Rows of the matrix are read a few side
// by side, once for up to four rows of x, into accumulators that stay in registers. Vectors are the
// compiler's: as wide as the machine it builds for has them.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int64_t kChunk = 64;  // outputs one thread takes at a time

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
inline To Bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
inline V Load(const T* from) {
  V to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline float Sum(Floats x) {
  float sum = 0;
  for (int n = 0; n < kLanes; ++n) sum += x[n];
  return sum;
}

// What one vector of a matrix holds, as float32, and x in the order that fits it. A word of two
// bfloat16 numbers is the second of them once its lower half is cleared, and the first once it is
// shifted; so x is sorted, of every vector the even places first.
struct F32 {
  using Stored = float;
  static constexpr int kVectors = 1;
  static float Widen(float x) { return x; }
  static void Split(const float* from, Floats* to) { to[0] = Load<Floats>(from); }
};

struct BF16 {
  using Stored = uint16_t;
  static constexpr int kVectors = 2;
  static float Widen(uint16_t x) { return Bits<float>(uint32_t{x} << 16); }
  static void Split(const uint16_t* from, Floats* to) {
    Words words = Load<Words>(from);
    to[0] = Bits<Floats>(words << 16);
    to[1] = Bits<Floats>(words & 0xffff0000u);
  }
};

template <typename T>
std::vector<float> Sorted(const typename T::Stored* x, int64_t rows, int64_t in) {
  constexpr int64_t step = T::kVectors * kLanes;
  std::vector<float> sorted(rows * in);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < in; ++k) {
      int64_t place = k % step, start = k - place;
      bool tail = start + step > in;
      int64_t at = tail ? k : start + place % T::kVectors * kLanes + place / T::kVectors;
      sorted[r * in + at] = T::Widen(x[r * in + k]);
    }
  }
  return sorted;
}

// R rows of x, sorted, with N rows of w: the sums go to y[R][N], whose rows are `out` apart.
template <int R, int N, typename T>
void Block(const float* x, const typename T::Stored* w, float* y, int64_t in, int64_t out) {
  constexpr int64_t step = T::kVectors * kLanes;
  Floats sum[R][N] = {};
  int64_t i = 0;
  for (; i + step <= in; i += step) {
    for (int n = 0; n < N; ++n) {
      Floats column[T::kVectors];
      T::Split(w + n * in + i, column);
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < T::kVectors; ++v) {
          sum[r][n] += Load<Floats>(x + r * in + i + v * kLanes) * column[v];
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      float total = Sum(sum[r][n]);
      for (int64_t k = i; k < in; ++k) total += x[r * in + k] * T::Widen(w[n * in + k]);
      y[r * out + n] = total;
    }
  }
}

// N outputs of all rows, up to four rows at a time, while their weights are in the cache.
template <int N, typename T>
void Outputs(const float* x, const typename T::Stored* w, float* y, int64_t rows, int64_t in,
             int64_t out) {
  for (; rows > 0; rows -= 4, x += 4 * in, y += 4 * out) {
    switch (std::min<int64_t>(rows, 4)) {
      case 1: Block<1, N, T>(x, w, y, in, out); break;
      case 2: Block<2, N, T>(x, w, y, in, out); break;
      case 3: Block<3, N, T>(x, w, y, in, out); break;
      default: Block<4, N, T>(x, w, y, in, out); break;
    }
  }
}

template <typename T>
void Range(const float* x, const typename T::Stored* w, float* y, int64_t rows, int64_t in,
           int64_t out, int64_t first, int64_t last) {
  // More rows need more registers: fewer outputs side by side then.
  int64_t o = first;
  if (rows == 1) {
    for (; o + 4 <= last; o += 4) Outputs<4, T>(x, w + o * in, y + o, rows, in, out);
  } else {
    for (; o + 2 <= last; o += 2) Outputs<2, T>(x, w + o * in, y + o, rows, in, out);
  }
  for (; o < last; ++o) Outputs<1, T>(x, w + o * in, y + o, rows, in, out);
}

// Chunks of outputs that threads take until none is left. Whoever waits for the last of them waits
// only for threads that are at work, never for a task that has not begun.
template <typename T>
struct Work {
  const typename T::Stored* w;
  float* y;
  int64_t rows, in, out, chunks;
  std::vector<float> x;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;

  void TakeChunks() {
    for (int64_t n; (n = next.fetch_add(1)) < chunks;) {
      Range<T>(x.data(), w, y, rows, in, out, n * kChunk, std::min(out, (n + 1) * kChunk));
      if (done.fetch_add(1) + 1 == chunks) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

template <typename T>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
               float* y) {
  using Stored = typename T::Stored;
  auto work = std::make_shared<Work<T>>();
  work->rows = x.dimensions()[0], work->in = x.dimensions()[1], work->out = w.dimensions()[0];
  work->chunks = (work->out + kChunk - 1) / kChunk;
  work->w = static_cast<const Stored*>(w.untyped_data()), work->y = y;
  work->x = Sorted<T>(static_cast<const Stored*>(x.untyped_data()), work->rows, work->in);
  int64_t helpers = std::min({threads, pool.num_threads(), work->chunks}) - 1;
  for (int64_t n = 0; n < helpers; ++n) pool.Schedule([work] { work->TakeChunks(); });
  work->TakeChunks();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == work->chunks; });
  return ffi::Error::Success();
}

ffi::Error FewRows(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::ResultBuffer<ffi::F32> y) {
  auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || xs[1] != ws[1] ||
      x.element_type() != w.element_type()) {
    return ffi::Error::InvalidArgument("x[R,I] and w[O,I] of one dtype are multiplied");
  }
  switch (w.element_type()) {
    case ffi::DataType::F32: return Run<F32>(pool, threads, x, w, y->typed_data());
    case ffi::DataType::BF16: return Run<BF16>(pool, threads, x, w, y->typed_data());
    default: return ffi::Error::InvalidArgument("float32 or bfloat16 are multiplied");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tpjax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
