// Products of a few rows with a matrix stored [out, in], for XLA on a CPU: y[R,O] = x[R,I] w[O,I]^T
// in float32, of bfloat16 or float32 operands.

#include "rows.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kChunk = 64;  // outputs one thread takes at a time

template <typename T>
ffi::Error Run(ffi::ThreadPool& pool, int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
               float* y) {
  using Stored = typename T::Stored;
  int64_t rows = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  std::vector<float> sorted;
  auto* rows_of_x = T::Rows(static_cast<const Stored*>(x.untyped_data()), rows, in, sorted);
  auto* matrix = static_cast<const Stored*>(w.untyped_data());
  InParallel(pool, threads, (out + kChunk - 1) / kChunk, [&](int64_t n) {
    Range<T>(rows_of_x, matrix, y, rows, in, out, n * kChunk, std::min(out, (n + 1) * kChunk));
  });
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
