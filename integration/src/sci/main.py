import numpy
import scipy.linalg
import scipy.optimize
import scipy.stats

matrix = numpy.array([[4.0, 1.0], [2.0, 3.0]])
largest = max(scipy.linalg.eigvals(matrix).real)
root = scipy.optimize.brentq(lambda x: x**3 - 2.0, 0.0, 2.0)
middle = scipy.stats.norm.cdf(0.0)
print(f"ready: eigenvalue {largest:.6f}, cube root {root:.6f}, median {middle:.6f}", flush=True)
