#include "launch.h"
namespace attnpool { int launch_backward(const KernelParams&, void*) { return -1; } }
