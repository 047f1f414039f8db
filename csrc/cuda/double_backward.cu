#include "launch.h"
namespace attnpool { int launch_double_backward(const KernelParams&, void*) { return -1; } }
