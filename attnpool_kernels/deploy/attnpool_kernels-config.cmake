# find_package(attnpool_kernels), after find_package(Torch):
#
#   attnpool_kernels::kernels    the operators attnpool::* and their kernels, for compiled models
#   attnpool_kernels::autograd   and attnpool_autograd::attention, which TorchScript models call:
#                                a library of one file, built here for the Torch that was found
#
# Both are loaded with the program; nothing in them is called by name.
if(NOT TARGET torch)
  set(attnpool_kernels_FOUND FALSE)
  set(attnpool_kernels_NOT_FOUND_MESSAGE "find_package(Torch) must come first")
  return()
endif()
get_filename_component(_attnpool_folder "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
file(GLOB _attnpool_libraries "${_attnpool_folder}/_C_cpu*.so")
if(Torch_CUDA_FOUND OR TORCH_CUDA_LIBRARIES)
  file(GLOB _attnpool_cuda "${_attnpool_folder}/_C_cuda*.so")
  list(APPEND _attnpool_libraries ${_attnpool_cuda})
endif()
if(NOT _attnpool_libraries)
  set(attnpool_kernels_FOUND FALSE)
  set(attnpool_kernels_NOT_FOUND_MESSAGE "the C++ library of attnpool_kernels is not built")
  return()
endif()

if(NOT TARGET attnpool_kernels::kernels)
  # As one option each, for CMake would take a name without "lib" for one to be searched.
  add_library(attnpool_kernels::kernels INTERFACE IMPORTED)
  target_include_directories(attnpool_kernels::kernels INTERFACE "${CMAKE_CURRENT_LIST_DIR}/include")
  foreach(_attnpool_library ${_attnpool_libraries})
    target_link_libraries(attnpool_kernels::kernels INTERFACE
      "-Wl,--push-state,--no-as-needed,${_attnpool_library},--pop-state")
  endforeach()
  target_link_libraries(attnpool_kernels::kernels INTERFACE "-Wl,-rpath,${_attnpool_folder}")

  add_library(attnpool_kernels_autograd SHARED EXCLUDE_FROM_ALL
    "${CMAKE_CURRENT_LIST_DIR}/autograd.cpp")
  set_target_properties(attnpool_kernels_autograd PROPERTIES
    CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON POSITION_INDEPENDENT_CODE ON)
  target_include_directories(attnpool_kernels_autograd PRIVATE "${CMAKE_CURRENT_LIST_DIR}/include")
  target_link_libraries(attnpool_kernels_autograd PRIVATE ${TORCH_LIBRARIES})
  add_library(attnpool_kernels::autograd INTERFACE IMPORTED)
  target_link_libraries(attnpool_kernels::autograd INTERFACE
    attnpool_kernels::kernels
    "-Wl,--push-state,--no-as-needed,$<TARGET_FILE:attnpool_kernels_autograd>,--pop-state"
    attnpool_kernels_autograd)  # again, so that it is built first and found when the program runs
endif()
