// Products with one of several matrices stored [out, in], for XLA on a CPU: y[R,O] = x[R,I] w[n,O,I]^T
// in float32, of bfloat16 or float32 operands, or of float32 and a matrix of bfloat16, widened on the
// way.
//
// A few rows are as fast as the matrix is read (rows.h), many as fast as sums are added up (panel.h).

#include "panel.h"

namespace ffi = xla::ffi;

namespace {

// Outputs of a few rows that one thread takes at a time: microseconds, as long as the others may have to
// wait for the last of them.
constexpr int64_t kChunk = 16;

// Few: how x, which comes as X, is held beside the matrix when it has few rows; Many: when it has many.
template <typename Few, typename Many, typename X>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w, int64_t n,
               float* y) {
  int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[1];
  auto* given = static_cast<const X*>(x.untyped_data());
  auto* matrix = static_cast<const typename Few::Stored*>(w.untyped_data()) + n * out * in;
  auto in_chunks = [&](int64_t chunk, auto work) {
    InParallel(pool, threads, (out + chunk - 1) / chunk,
               [&](int64_t c) { work(c * chunk, std::min(out, (c + 1) * chunk)); });
  };
  std::vector<float> room;
  if (rows > Many::kFew && in % Many::kInputs == 0) {
    auto* held = As<typename Many::Row>(given, rows * in, room);
    in_chunks(kPanel * kLanes, [&](int64_t first, int64_t last) {
      Panel<Many>(held, matrix + first * in, y + first, rows, in, out, last - first);
    });
    return ffi::Error::Success();
  }
  auto* held = Few::Rows(given, rows, in, room);
  in_chunks(kChunk, [&](int64_t first, int64_t last) {
    Range<Few>(held, matrix, y, rows, in, out, first, last);
  });
  return ffi::Error::Success();
}

ffi::Error Product(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                   ffi::BufferR0<ffi::S32> which, ffi::ResultBuffer<ffi::F32> y) {
  auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 3 || xs[1] != ws[2] || ws[0] < 1) {
    return ffi::Error::InvalidArgument("x[R,I] and one of w[N,O,I] are multiplied");
  }
  int64_t n = std::clamp<int64_t>(which.typed_data()[0], 0, ws[0] - 1);
  auto are = [&](ffi::DataType row, ffi::DataType matrix) {
    return x.element_type() == row && w.element_type() == matrix;
  };
  constexpr auto kWide = ffi::DataType::F32, kNarrow = ffi::DataType::BF16;
  float* to = y->typed_data();
  if (are(kWide, kWide)) return Run<F32, Singles, float>(pool, threads, x, w, n, to);
  if (are(kNarrow, kNarrow)) return Run<BF16, Pairs, uint16_t>(pool, threads, x, w, n, to);
  if (are(kWide, kNarrow)) return Run<Widened, Widening, float>(pool, threads, x, w, n, to);
  return ffi::Error::InvalidArgument("float32 is multiplied, or bfloat16 with either");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tpjax_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
