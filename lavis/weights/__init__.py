"""Weight files of every dialect: finding, fetching, reading and naming their tensors."""
