// A compiled module.

#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "crew.h"

namespace {

// What inductor made of a module, and what it reads beside its arguments. One thread runs it at a time.
class Program : public torch::CustomClassHolder {
 public:
  // together: whether the threads stay together while it runs; torch's own operators in it then have one of them.
  Program(std::string path, std::vector<at::Tensor> inputs, bool together)
      : loader(path, "model", true), inputs(std::move(inputs)), together(together) {}

  std::vector<at::Tensor> run(std::vector<at::Tensor> args) {
    const std::lock_guard<std::mutex> alone(lock);
    args.insert(args.begin(), inputs.begin(), inputs.end());
    if (!together || at::get_num_threads() == 1 || at::in_parallel_region()) return loader.run(args);
    std::vector<at::Tensor> out;
    Crew::run(order, [&] { out = loader.run(args); });
    return out;
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader;
  std::vector<at::Tensor> inputs;
  bool together;
  std::mutex lock;
  std::vector<Weights> order;
};

}  // namespace
