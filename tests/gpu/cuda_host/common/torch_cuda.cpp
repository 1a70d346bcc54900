// In place of libtorch_cuda: there is one device and one stream. And for the tests, the order of threads to set, and how
// many launches there were.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(guard);
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

__attribute__((visibility("default"))) void cuda_host_order(unsigned order) {
  cuda_host::order = order;
  cuda_host::random_order.seed(order);
}

__attribute__((visibility("default"))) unsigned cuda_host_launches() { return cuda_host::launches; }
}
