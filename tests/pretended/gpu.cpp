// A GPU that is not there: PyTorch's CUDA device in a build without CUDA, for the tests of the code for GPUs.
//
// Its memory is the host's and its operations are the CPU's, run on the same memory. What is kept of a GPU:
//   - tensors of both devices do not meet in an operation, but for numbers and positions;
//   - what makes the host wait for the device is an error where that is asked for (gpu_no_waiting);
//   - only what is allocated on it counts as its memory.
// Streams and events do nothing: everything happens at once and in order.
//
// It has to be loaded before `import torch`, which asks for the devices that there are (pretended_gpu.py).
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>

namespace {
using namespace c10;

const Device kGpu(kCUDA, 0);
const DispatchKeySet kKeys(DispatchKey::CUDA);
std::atomic<bool> no_waiting{false};
std::atomic<long> allocated{0}, peak{0}, limit{80L << 30};

void waits(const std::string& what) {
  TORCH_CHECK(!no_waiting, "called a synchronizing CUDA operation: ", what);
}

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device) const override { return kGpu; }
  Device getDevice() const override { return kGpu; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, kGpu); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, kGpu); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
} guard;

struct Memory final : Allocator {
  static constexpr size_t kHead = 64;  // in front of a block lies its size
  static void give_back(void* block) {
    if (block == nullptr) return;
    char* start = static_cast<char*>(block) - kHead;
    allocated -= *reinterpret_cast<long*>(start);
    std::free(start);
  }
  DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &give_back, kGpu};
    TORCH_CHECK_WITH(OutOfMemoryError, allocated + static_cast<long>(bytes) <= limit, "CUDA out of memory.");
    char* start = static_cast<char*>(std::aligned_alloc(kHead, kHead + (bytes + kHead - 1) / kHead * kHead));
    *reinterpret_cast<long*>(start) = static_cast<long>(bytes);
    long now = allocated += static_cast<long>(bytes), top = peak;
    while (now > top && !peak.compare_exchange_weak(top, now)) {
    }
    return {start + kHead, start + kHead, &give_back, kGpu};
  }
  DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

struct Pinned final : Allocator {
  std::set<const void*> blocks;  // an address that was pinned once is taken for pinned from then on
  mutable std::mutex lock;
  DataPtr allocate(size_t bytes) override {
    DataPtr found = GetCPUAllocator()->allocate(bytes);
    std::lock_guard<std::mutex> held(lock);
    blocks.insert(found.get());
    return found;
  }
  bool has(const void* block) const {
    std::lock_guard<std::mutex> held(lock);
    return blocks.count(block) > 0;
  }
  DeleterFnPtr raw_deleter() const override { return GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned;

struct PretendedHooks final : at::CUDAHooksInterface {
  explicit PretendedHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return pinned.has(data); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
};

// The same memory, as the CPU's.
at::Tensor on_cpu(const at::Tensor& tensor) {
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(kCPU);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

at::Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, dtype_or_default(dtype), format);
}

at::Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device() && !non_blocking) waits("a copy");
  at::Tensor to = self.is_cuda() ? on_cpu(self) : self;
  to.copy_(source.is_cuda() ? on_cpu(source) : source);
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& self, bool non_blocking) {
  at::Tensor to = self;
  return copy_(to, source, non_blocking);
}

const at::Tensor& resize_(const at::Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  Storage storage = self.storage();
  if (storage.nbytes() < bytes) {
    DataPtr grown = memory.allocate(bytes);
    if (storage.nbytes() > 0) memory.copy_data(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  waits("a number is read");
  return on_cpu(self).item();
}

// The arguments of an operation as the CPU's, and what it gives as the GPU's.
struct Lent {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // ours, the CPU's
  bool cpu = false, gpu = false;

  at::Tensor operator()(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      cpu = cpu || tensor.dim() > 0;
      return tensor;
    }
    gpu = true;
    for (auto& [ours, theirs] : pairs)
      if (ours.is_same(tensor)) return theirs;
    pairs.emplace_back(tensor, on_cpu(tensor));
    return pairs.back().second;
  }

  IValue operator()(const IValue& value) {
    if (value.isTensor()) return (*this)(value.toTensor());
    if (value.isTensorList()) {
      List<at::Tensor> out;
      for (const at::Tensor& tensor : value.toTensorVector()) out.push_back((*this)(tensor));
      return out;
    }
    if (value.isOptionalTensorList()) {
      List<std::optional<at::Tensor>> out;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        out.push_back(tensor ? std::optional<at::Tensor>((*this)(*tensor)) : std::nullopt);
      return out;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) {
      gpu = true;
      return Device(kCPU);
    }
    return value;
  }

  at::Tensor back(const at::Tensor& tensor) {
    if (!tensor.defined() || !gpu) return tensor;
    for (auto& [ours, theirs] : pairs)
      if (theirs.is_same(tensor)) return ours;
    at::Tensor out = at::detail::empty_strided_generic(tensor.sizes(), tensor.strides(), &memory, kKeys,
                                                       tensor.scalar_type());
    on_cpu(out).copy_(tensor);
    return out;
  }

  IValue back(const IValue& value) {
    if (value.isTensor()) return back(value.toTensor());
    if (!value.isTensorList()) return value;
    List<at::Tensor> out;
    for (const at::Tensor& tensor : value.toTensorVector()) out.push_back(back(tensor));
    return out;
  }
};

void by_the_cpu(const OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> waiting = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::equal"};
  const std::string& name = op.schema().name();
  if (waiting.count(name) > 0) waits(name);
  Lent lent;
  for (const IValue& value : torch::jit::pop(*stack, op.schema().arguments().size())) stack->push_back(lent(value));
  TORCH_CHECK(!(lent.cpu && lent.gpu), name, ": Expected all tensors to be on the same device, but found cuda:0 and cpu");
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (auto& [ours, theirs] : lent.pairs) {
    if (ours.sizes().equals(theirs.sizes()) && (ours.numel() == 0 || ours.data_ptr() == theirs.data_ptr())) continue;
    resize_(ours, theirs.sizes(), std::nullopt);  // an output that was given too small
    on_cpu(ours).copy_(theirs);
  }
  for (const IValue& value : torch::jit::pop(*stack, op.schema().returns().size())) stack->push_back(lent.back(value));
}

impl::DeviceGuardImplRegistrar guarded(kCUDA, &guard);
const bool remembered = (SetAllocator(kCUDA, &memory), true);

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  // a GPU has a kernel of its own where PyTorch would otherwise take the formula
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>());
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}
}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks)
}

extern "C" {
int gpu_no_waiting(int on) { return no_waiting.exchange(on != 0); }  // how it was
long gpu_allocated() { return allocated; }
long gpu_peak() { return peak; }
void gpu_limit(long bytes) { limit = bytes; }
void gpu_reset_peak() { peak = allocated.load(); }
}
