# Which device runtimes are built besides the CPU's. AUTO: those whose compiler is found.

foreach(option MEP_CUDA MEP_MACA)
  if(NOT "${${option}}" MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "${option} is \"${${option}}\"; it may be AUTO, ON or OFF")
  endif()
endforeach()

# ---- CUDA ---------------------------------------------------------------------------------------

set(use_cuda ${MEP_CUDA})
if(MEP_CUDA STREQUAL "AUTO")
  include(CheckLanguage)
  check_language(CUDA)
  set(use_cuda OFF)
  if(CMAKE_CUDA_COMPILER)
    set(use_cuda ON)
  endif()
endif()

if(use_cuda)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90 100)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "CUDA: on, for ${CMAKE_CUDA_ARCHITECTURES}")

  add_library(mooncake_ep_cuda OBJECT ${PROJECT_SOURCE_DIR}/libep/backend/cuda.cu)
  target_include_directories(mooncake_ep_cuda PRIVATE ${PROJECT_SOURCE_DIR}/include
                                                      ${PROJECT_SOURCE_DIR}/libep)
  # No product may be fused with a sum: GPUs and CPUs give the same bits.
  target_compile_options(mooncake_ep_cuda PRIVATE --fmad=false)
  set_target_properties(mooncake_ep_cuda PROPERTIES
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
  )
  target_sources(mooncake_ep_objects INTERFACE $<TARGET_OBJECTS:mooncake_ep_cuda>)
  target_link_libraries(mooncake_ep_objects INTERFACE CUDA::cudart_static)
else()
  message(STATUS "CUDA: off (MEP_CUDA=${MEP_CUDA})")
  target_sources(mooncake_ep_objects PRIVATE libep/backend/no_cuda.cc)
endif()

# ---- MACA ---------------------------------------------------------------------------------------

include(${CMAKE_CURRENT_LIST_DIR}/maca.cmake)
