// The kernels of csrc/cuda compiled for the host, and buffers that lie between pages that nobody may touch.
#define LF_HOST_EMULATION
#include <sys/mman.h>
#include <unistd.h>

#include <map>

#include "decode_rows.cuh"
#include "kd_step.cuh"

namespace {

using latentforge::cuda::Device;
using latentforge::cuda::KdCall;

struct Buffer {
  char* pages;
  size_t mapped;
  size_t bytes;
};
std::map<char*, Buffer> buffers;
constexpr char kUntouched = 0x5a;

char* data_end(const Buffer& b, size_t page) { return b.pages + b.mapped - page; }

template <class Call>
int guarded(uint64_t order, char* error, int size, Call call) {
  lf_host::machine.order = order;
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, static_cast<size_t>(size), "%s", e.what());
    return 1;
  }
}

}  // namespace

extern "C" {

// `bytes` at an address that is `misalignment` past a multiple of 16, as close to the forbidden page behind as can be.
void* lf_allocate(size_t bytes, size_t misalignment) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inner = (bytes + 32 + page - 1) / page * page;
  char* pages = static_cast<char*>(mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (pages == MAP_FAILED) return nullptr;
  mprotect(pages + page, inner, PROT_READ | PROT_WRITE);
  std::memset(pages + page, kUntouched, inner);
  char* data = pages + page + (inner - bytes) / 16 * 16 + misalignment;
  if (data + bytes > pages + page + inner) data -= 16;
  buffers[data] = {pages, inner + 2 * page, bytes};
  return data;
}

// 0 where nothing around the buffer was written to.
int lf_overrun(void* p) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* data = static_cast<char*>(p);
  const Buffer& b = buffers.at(data);
  const auto touched = [](char c) { return c != kUntouched; };
  return std::any_of(b.pages + page, data, touched) || std::any_of(data + b.bytes, data_end(b, page), touched);
}

void lf_release(void* p) {
  const auto found = buffers.find(static_cast<char*>(p));
  munmap(found->second.pages, found->second.mapped);
  buffers.erase(found);
}

size_t lf_size_of_kd_call() { return sizeof(KdCall); }
int64_t lf_kd_workspace_bytes(const KdCall* call) { return latentforge::cuda::kd_workspace_bytes(*call); }

int lf_kd_rows(const KdCall* call, int multiprocessors, int64_t cache_bytes, uint64_t order, char* error, int size) {
  return guarded(order, error, size, [&] {
    Device device;
    device.multiprocessors = multiprocessors;
    device.cache_bytes = cache_bytes;
    latentforge::cuda::launch_kd(*call, device, 0);
  });
}

size_t lf_size_of_decode_call() { return sizeof(latentforge::cuda::DecodeCall); }
int64_t lf_decode_workspace_bytes() { return latentforge::cuda::decode_workspace_bytes(); }

int lf_decode(const latentforge::cuda::DecodeCall* call, int multiprocessors, uint64_t order, char* error, int size) {
  return guarded(order, error, size, [&] { latentforge::cuda::launch_decode(*call, multiprocessors, 0); });
}

}  // extern "C"
