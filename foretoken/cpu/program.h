// A compiled module.

#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <mutex>
#include <string>
#include <tuple>
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
    for (at::Tensor& arg : args) arg = arg.contiguous();
    args.insert(args.begin(), inputs.begin(), inputs.end());
    if (!together || at::get_num_threads() == 1 || at::in_parallel_region()) return loader.run(args);
    std::vector<at::Tensor> out;
    Crew::run(order, [&] { out = loader.run(args); });
    return out;
  }

  // The same, and the whole numbers of output `number`, one row behind the other.
  std::tuple<std::vector<at::Tensor>, std::vector<int64_t>> tell(std::vector<at::Tensor> args, int64_t number) {
    auto out = run(std::move(args));
    const at::Tensor told = out.at(number).contiguous();
    const int64_t* first = told.const_data_ptr<int64_t>();
    return {std::move(out), std::vector<int64_t>(first, first + told.numel())};
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader;
  std::vector<at::Tensor> inputs;
  bool together;
  std::mutex lock;
  std::vector<Weights> order;
};

}  // namespace
