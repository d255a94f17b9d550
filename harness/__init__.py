"""What main.py, launch.sh and bench.py work with: data, run folders, results, tables, published weights."""
