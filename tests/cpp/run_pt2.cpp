// Runs an AOTInductor package of an exported network: no Python.
//
//   run_pt2 OPERATORS PACKAGE INPUT OUTPUT PATH N C H W
//
// OPERATORS is the library with this project's operators, smart_kernels/_C.abi3.so; INPUT and OUTPUT are files of raw
// float32, INPUT of N x C x H x W numbers; PATH is clean or adv.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_images(const std::string& file, const std::vector<int64_t>& shape) {
  at::Tensor images = at::empty(shape, at::kFloat);
  std::ifstream stream(file, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(images.nbytes());
  if (!stream.read(static_cast<char*>(images.mutable_data_ptr()), bytes))
    throw std::runtime_error(file + " holds fewer than " + std::to_string(bytes) + " bytes");
  return images;
}

void write_numbers(const std::string& file, const at::Tensor& tensor) {
  const at::Tensor numbers = tensor.contiguous();
  std::ofstream stream(file, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(numbers.nbytes());
  if (!stream.write(static_cast<const char*>(numbers.const_data_ptr()), bytes))
    throw std::runtime_error("cannot write " + file);
}

void run(const std::vector<std::string>& args) {
  if (args.size() != 9) throw std::invalid_argument("usage: run_pt2 OPERATORS PACKAGE INPUT OUTPUT PATH N C H W");
  // Loading the library registers its operators with torch, by name, where the package finds them.
  if (!dlopen(args[0].c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader program(args[1]);

  std::vector<int64_t> shape;
  for (size_t i = 5; i < 9; ++i) shape.push_back(std::stoll(args[i]));
  const bool second_path = args[4] == "adv";

  const c10::InferenceMode inference;
  const std::vector<at::Tensor> outputs =
      program.run({read_images(args[2], shape), at::scalar_tensor(second_path, at::kBool)});
  write_numbers(args[3], outputs.at(0));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run({argv + 1, argv + argc});
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
