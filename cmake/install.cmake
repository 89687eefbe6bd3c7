# For C and C++ programs: find_package(mooncake_ep CONFIG) and pkg-config. The installed tree may be
# moved as a whole.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/mooncake_ep)
install(TARGETS mooncake_ep EXPORT mooncake_ep-targets)
install(FILES ${PROJECT_SOURCE_DIR}/include/mooncake_ep.h TYPE INCLUDE)
install(EXPORT mooncake_ep-targets NAMESPACE mooncake_ep:: DESTINATION ${package_dir})

configure_package_config_file(
  ${CMAKE_CURRENT_LIST_DIR}/mooncake_ep-config.cmake.in
  ${PROJECT_BINARY_DIR}/mooncake_ep-config.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/mooncake_ep-config-version.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/mooncake_ep-config.cmake
              ${PROJECT_BINARY_DIR}/mooncake_ep-config-version.cmake
        DESTINATION ${package_dir})

file(RELATIVE_PATH includedir_from_pc ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig
                                      ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(${CMAKE_CURRENT_LIST_DIR}/mooncake_ep.pc.in ${PROJECT_BINARY_DIR}/mooncake_ep.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/mooncake_ep.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
