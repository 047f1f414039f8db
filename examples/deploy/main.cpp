// Runs a model that Python wrote, in a program without Python, and compares:
//
//   deployed MODEL DATA     MODEL: name.pt2 (AOTInductor) or name.pt (TorchScript)
//
// DATA holds batches of different sizes with the results of Python. A TorchScript model gives
// energies; where its second input is positions, forces are found here, by autograd, and compared
// with those of the compiled model, and a second derivative is taken as training on forces would.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>

using at::Tensor;
using Tensors = std::vector<Tensor>;

static std::vector<c10::IValue> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::List<c10::IValue> rows = torch::jit::pickle_load(bytes).toList();
  return {rows.begin(), rows.end()};
}

static Tensors tensors(const c10::IValue& list) {
  Tensors found;
  for (const c10::IValue& x : list.toListRef()) found.push_back(x.toTensor());
  return found;
}

// The energies, or whatever the model gives; and forces where it takes positions.
static Tensors run_scripted(torch::jit::Module& model, Tensors inputs) {
  const bool with_forces = inputs.size() == 4;
  if (with_forces) inputs[1] = inputs[1].detach().requires_grad_();
  const Tensor out = model.forward({inputs.begin(), inputs.end()}).toTensor();
  if (!with_forces) return {out};
  using torch::autograd::grad;
  const Tensor gradient = grad({out.sum()}, {inputs[1]}, {}, true, true)[0];
  const Tensor second = grad({gradient.square().sum()}, {inputs[1]})[0];
  if (!second.isfinite().all().item<bool>()) throw std::runtime_error("no second derivative");
  return {out.detach(), -gradient.detach()};
}

int main(int count, char** arguments) try {
  if (count != 3) return std::cerr << "usage: deployed MODEL DATA\n", 2;
  const std::string path = arguments[1];
  const bool compiled = path.size() > 4 && path.substr(path.size() - 4) == ".pt2";
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> package;
  torch::jit::Module scripted;
  if (compiled) package = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path);
  else scripted = torch::jit::load(path);
  double worst = 0;
  for (const c10::IValue& row : read(arguments[2])) {
    const auto pair = row.toListRef();
    const Tensors expected = tensors(pair[1]), inputs = tensors(pair[0]);
    const Tensors found = compiled ? package->run(inputs) : run_scripted(scripted, inputs);
    for (size_t i = 0; i < expected.size(); ++i)
      worst = std::max(worst, (found.at(i) - expected[i]).abs().max().item<double>());
  }
  std::cout << path << ": largest difference " << worst << "\n";
  return worst < 1e-12 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
