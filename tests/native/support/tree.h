// Folders that tests read instead of the machine's, and the files of tests/data. A tree is kept as
// one text, because a sysfs consists of many small files and symbolic links; a line is one of
//     # a comment
//     path = content of a file
//     path -> target of a symbolic link
// Paths are relative to the root of the tree.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <iterator>
#include <sstream>
#include <string>

namespace ep::test {

inline std::string read_data(const std::string &name) {
    std::ifstream file(std::string(MEP_TEST_DATA_DIR) + "/" + name, std::ios::binary);
    EXPECT_TRUE(file.is_open()) << name;
    return {std::istreambuf_iterator<char>(file), {}};
}

// A tree in a temporary folder, which goes when this goes.
class Tree {
  public:
    explicit Tree(const std::string &text) {
        std::string folder = ::testing::TempDir() + "mooncake_ep_tree_XXXXXX";
        if (mkdtemp(folder.data()) == nullptr) ADD_FAILURE() << "no temporary folder: " << folder;
        root_ = folder;
        std::istringstream lines(text);
        for (std::string line; std::getline(lines, line);)
            add(line);
    }
    Tree(const Tree &) = delete;
    Tree &operator=(const Tree &) = delete;
    ~Tree() {
        std::error_code error;
        std::filesystem::remove_all(root_, error);
    }

    std::string root() const { return root_; }

    // Adds what a line says, in place of what is there.
    void add(const std::string &line) {
        if (line.empty() || line[0] == '#') return;
        const size_t link = line.find(" -> "), file = line.find(" = ");
        if (link != line.npos)
            std::filesystem::create_symlink(line.substr(link + 4), fresh(line.substr(0, link)));
        else if (file != line.npos)
            std::ofstream(fresh(line.substr(0, file))) << line.substr(file + 3) << '\n';
        else
            ADD_FAILURE() << "not a line of a tree: " << line;
    }

    void remove(const std::string &path) { std::filesystem::remove_all(root_ / path); }

  private:
    // The place of a file whose folder is there and which itself is not.
    std::filesystem::path fresh(const std::string &path) {
        remove(path);
        std::filesystem::create_directories((root_ / path).parent_path());
        return root_ / path;
    }

    std::filesystem::path root_;
};

}  // namespace ep::test
