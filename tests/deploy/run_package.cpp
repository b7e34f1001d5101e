// Runs a package with one float matrix: run_package MODEL.pt2 INPUT ROWS COLUMNS OUTPUT. Knows nothing of Python.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    const long rows = std::atol(argv[3]), columns = std::atol(argv[4]);
    std::vector<float> values(rows * columns);
    std::ifstream(argv[2], std::ios::binary).read(reinterpret_cast<char *>(values.data()), values.size() * sizeof(float));
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    const auto results = loader.run({at::from_blob(values.data(), {rows, columns})});
    const auto y = results.at(0).contiguous();
    std::ofstream(argv[5], std::ios::binary).write(static_cast<const char *>(y.data_ptr()), y.nbytes());
    return 0;
}
