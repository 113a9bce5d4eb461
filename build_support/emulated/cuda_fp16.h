// In the place of CUDA's header.
#include "on_host.h"
