"""The rule `hf_lqa.rule.Displacement` once more: plain loops, in the order in which its documentation says it."""

import math


class Reference:
    """One run, from shapes, `()` for what is frozen, to per-tensor multipliers."""

    def __init__(self, shapes, total_steps=None, eta=0.3):
        self.eta = eta
        self.total_steps = 1000 if total_steps is None else total_steps
        self.sizes = []
        matrices, elements = [], 0
        for place, shape in enumerate(shapes):
            size = 1
            for side in shape:
                size *= side
            self.sizes.append(size)
            if shape:
                elements += size
            if len(shape) == 2 and size > 0:
                matrices.append((place, size))

        # A typical matrix: the geometric mean, each weighted by its root. Without a matrix, all elements.
        counted = matrices or ([(None, elements)] if elements else [])
        above = below = 0.0
        for _, size in counted:
            above += math.sqrt(size) * math.log(size)
            below += math.sqrt(size)
        typical = math.exp(above / below) if counted else 1.0
        self.prior = 0.56 / math.sqrt(typical) / self.total_steps**0.3

        # Adapters: of each rank the first wide matrix and the first that takes its result, then the second ones. If as
        # many wide ones stand beside one that takes their result, these.
        self.adapters, last_wide = [], -1
        for rank in {shapes[place][0] for place, _ in matrices}:
            wide = [place for place, _ in matrices if shapes[place][0] == rank < shapes[place][1]]
            tall = [place for place, _ in matrices if shapes[place][0] > shapes[place][1] == rank]
            pairs = []
            for k in range(min(len(wide), len(tall))):
                if wide[k] < tall[k]:
                    pairs.append((wide[k], tall[k]))
            beside = []
            for k in range(len(matrices) - 1):
                if matrices[k][0] in wide and matrices[k + 1][0] in tall:
                    beside.append((matrices[k][0], matrices[k + 1][0]))
            if len(pairs) >= 3 and len(beside) >= len(pairs):
                pairs = beside
            if len(pairs) >= 3:
                for first, second in pairs:
                    self.adapters += [first, second]
                    last_wide = max(last_wide, first)
        if len(self.adapters) < 0.75 * len(matrices):
            self.adapters = []

        # How many other matrices have a matrix's shape: one is alone, three are layers.
        matrices = [(place, size) for place, size in matrices if place not in self.adapters]
        alike = {}
        for place, _ in matrices:
            alike[place] = 0
            for other, _ in matrices:
                alike[place] += shapes[other] == shapes[place]

        heads, first_of_body, last_of_body = [], None, None
        if self.adapters:
            first_of_body = min(place for place in self.adapters if shapes[place][0] < shapes[place][1])
            last_of_body = last_wide
            # After them the head is what is no layer, and no table.
            for place, _ in matrices:
                if place > last_of_body and alike[place] <= 2 and shapes[place][0] <= shapes[place][1]:
                    heads.append(place)
        elif matrices:
            # The body ends with the last matrix of the median size, where half of all roots is in larger ones.
            left = sum(math.sqrt(size) for _, size in matrices) / 2
            tie = 1e-9 * left
            for _, median in sorted(matrices, key=lambda matrix: matrix[1], reverse=True):
                left -= math.sqrt(median)
                if left <= tie:
                    break
            body = [place for place, size in matrices if size >= median]
            first_of_body, last_of_body = min(body), max(body)
            # Or with a later layer: the longest part that is one sequence of shapes, three times or more.
            longest, layers = 0, None
            for length in range(1, len(matrices) // 3 + 1):
                for begin in range(len(matrices)):
                    times = 1
                    while True:
                        earlier = matrices[begin : begin + length]
                        later = matrices[begin + times * length : begin + (times + 1) * length]
                        if [shapes[place] for place, _ in later] != [shapes[place] for place, _ in earlier]:
                            break
                        times += 1
                    if times >= 3 and times * length > longest:
                        longest, layers = times * length, (matrices[begin][0], matrices[begin + times * length - 1][0])
            if layers:
                first_of_body, last_of_body = min(first_of_body, layers[0]), max(last_of_body, layers[1])
            # Matrices that follow are the head, if one of them is like one other at most.
            heads = [place for place, _ in matrices if place > last_of_body]
            if all(alike[place] > 2 for place in heads):
                heads = []
            # A head that comes first is told by the table of words after it.
            if layers is None or shapes[first_of_body][0] <= shapes[first_of_body][1]:
                first_of_body = None
        if not heads and first_of_body is not None:
            heads = [place for place, _ in matrices if place < first_of_body]
            biases = [shape[0] for shape in shapes if len(shape) == 1]
            for place in heads:
                if shapes[place][0] > shapes[place][1] or shapes[place][0] not in biases:
                    heads = []
            if all(alike[place] > 2 for place in heads):
                heads = []
        # Then vectors move as far.
        self.first = []
        for place, shape in enumerate(shapes):
            fast = place in heads or (len(shape) == 1 and len(heads) > 0)
            self.first.append(8.0 if fast else 1.0)

        self.base = self.most = None
        self.agreement, self.agreements = 0.0, 0
        self.drift = [0.0] * len(shapes)
        self.mean_squares = [0.0] * len(shapes)
        self.measurements = 0
        # One step of 1, 2, 3 and so on, each for a time.
        self.distance, self.until = 1, 12

    def start(self, begun, radius=0.0, minimiser=None, bound=math.inf):
        """Of the prior in units of the direction, and of a probe whose radius is the loss's."""
        # What is fast beside adapters goes no further than a loss above 0 could fall, but as far as they do.
        for place, first in enumerate(self.first):
            if self.adapters and begun > bound and first > 1:
                self.first[place] = max(1.0, first / (begun / bound))
        if minimiser is not None and minimiser < radius:
            radius = minimiser
        self.base = self.most = begun if begun > radius else radius
        if minimiser is not None and minimiser > self.most:
            self.most = minimiser

    def ramp(self, step):
        length = round(0.03 * self.total_steps)
        return (step + 1) / length if step + 1 < length else 1.0

    def measures(self, step):
        """To be asked of one step after the other."""
        if step == self.until:
            # As many as it takes for one to count 1 / distance of the first: 1 / sqrt(k / 4 + 1).
            self.distance += 1
            first, last = 4 * self.distance**2, 4 * (self.distance + 1) ** 2
            self.until += (last - first) * self.distance
        return step > 0 and step % self.distance == 0

    def observe(self, slopes, agreement, factor, step):
        shrunk = factor if factor < 1 else 1.0

        # The base step size, by the sign agreement of late, once a whole step was made.
        if math.isfinite(agreement) and step >= round(0.03 * self.total_steps):
            self.agreement = 0.8 * self.agreement + 0.2 * agreement
            self.base *= math.exp(-4 * (shrunk / math.sqrt(self.agreements + 4)) * self.agreement)
            self.agreements += 1
            if self.base > self.most:
                self.base = self.most

        # Each tensor whose slope is known, by the slope in units of its own size.
        weight = shrunk / math.sqrt(self.measurements + 4)
        self.measurements += 1
        for place, slope in enumerate(slopes):
            if place >= len(self.sizes) or slope is None or not math.isfinite(slope * slope) or slope == 0:
                continue
            mean_square = 0.8 * self.mean_squares[place] + (1 - 0.8) * (slope * slope)
            if mean_square == 0:
                continue
            self.mean_squares[place] = mean_square
            z = slope / math.sqrt(mean_square / (1 - 0.8**self.measurements))
            z = 0.0 if place in self.adapters else z
            self.drift[place] -= self.eta * weight * z

        # Together all that ever had one move as far as before.
        known = [place for place, square in enumerate(self.mean_squares) if square > 0]
        if not known:
            return
        above = below = 0.0
        for place in known:
            above += math.sqrt(self.sizes[place]) * math.exp(self.drift[place]) ** 2
            below += math.sqrt(self.sizes[place])
        for place in known:
            drift = self.drift[place] - math.log(math.sqrt(above / below))
            self.drift[place] = math.log(2) if drift > math.log(2) else -math.log(2) if drift < -math.log(2) else drift

        # The others move as what comes before them; those at the beginning, as the first of these.
        last = self.drift[known[0]]
        for place in range(len(self.drift)):
            if place in known:
                last = self.drift[place]
            self.drift[place] = last

    def multipliers(self):
        found = []
        for first, drift in zip(self.first, self.drift, strict=True):
            found.append(first * 2 ** (round(2 * drift / math.log(2)) / 2))
        return found
