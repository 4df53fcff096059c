// A compiled module.

#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <chrono>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "crew.h"

namespace {

using Tensors = std::vector<at::Tensor>;
using Numbers = std::vector<int64_t>;

constexpr std::chrono::milliseconds LONG(100);  // after which no further run begins: whoever called may want to stop

// What inductor made of a module, and what it reads beside its arguments. One thread runs it at a time.
class Program : public torch::CustomClassHolder {
 public:
  // together: whether the threads stay together while it runs; torch's own operators in it then have one of them.
  // loop: `program.Loop` as lists: the outputs that go back, to which arguments, those kept, and {left, told, where left was}.
  Program(std::string path, Tensors inputs, bool together, std::vector<Numbers> loop)
      : loader(path, "model", true), inputs(std::move(inputs)), together(together), loop(std::move(loop)) {}

  Tensors run(Tensors args) {
    Tensors out;
    alone(args, [&] { out = loader.run(args); });
    return out;
  }

  // Up to `times` runs, each on what the one before it left, until nothing is left of a row: the outputs of the last
  // one, those kept of all of them, and the whole numbers that each told.
  std::tuple<Tensors, Numbers> repeat(Tensors args, int64_t times) {
    Tensors out;
    Numbers told;
    std::vector<Tensors> kept(loop.at(2).size());
    const auto began = std::chrono::steady_clock::now();
    const int64_t busy = at::count_nonzero(args.at(loop[3].at(2))).item<int64_t>();
    const auto goes_on = [&] {
      return at::count_nonzero(out.at(loop[3][0])).item<int64_t>() == busy && busy &&
             std::chrono::steady_clock::now() - began < LONG;
    };
    alone(args, [&] {
      for (int64_t i = 0; i < times && (i == 0 || goes_on()); i++) {
        for (size_t k = 0; i > 0 && k < loop[0].size(); k++) {
          at::Tensor& arg = args.at(inputs.size() + loop[1].at(k));
          arg = out.at(loop[0][k]).reshape(arg.sizes()).contiguous();
        }
        out = loader.run(args);
        append(told, out.at(loop[3].at(1)));
        for (size_t k = 0; k < kept.size(); k++) kept[k].push_back(out.at(loop[2][k]));
      }
    });
    for (size_t k = 0; k < kept.size(); k++)
      if (kept[k].size() > 1) out[loop[2][k]] = at::cat(kept[k], 1);
    return {std::move(out), std::move(told)};
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader;
  Tensors inputs;
  bool together;
  std::vector<Numbers> loop;
  std::mutex lock;
  std::vector<Weights> order;

  // task() while nobody else runs the program, on all of its arguments.
  template <class Task>
  void alone(Tensors& args, const Task& task) {
    const std::lock_guard<std::mutex> locked(lock);
    for (at::Tensor& arg : args) arg = arg.contiguous();
    args.insert(args.begin(), inputs.begin(), inputs.end());
    if (together && at::get_num_threads() > 1 && !at::in_parallel_region()) Crew::run(order, task);
    else task();
  }

  static void append(Numbers& numbers, const at::Tensor& more) {
    const at::Tensor whole = more.contiguous();
    const int64_t* first = whole.const_data_ptr<int64_t>();
    numbers.insert(numbers.end(), first, first + whole.numel());
  }
};

}  // namespace
