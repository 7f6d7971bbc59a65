/* Factors a product of two primes by Pollard's rho in Brent's form, with numbers of any size that live
 * on the heap: every operation returns a fresh number and its operands are freed soon after, so that the
 * program makes millions of small, short-lived objects of a few sizes.
 *
 * usage: factor [TIMES] */
#include "program.h"

/* Little-endian limbs without leading zeroes; zero has none. */
struct number {
    uint32_t len;
    uint32_t limbs[];
};

static struct number *number_new(uint32_t len) {
    struct number *n = malloc(sizeof *n + len * sizeof n->limbs[0]);
    if (n == NULL) {
        fail("out of memory");
    }
    n->len = len;
    return n;
}

static struct number *trimmed(struct number *n) {
    while (n->len > 0 && n->limbs[n->len - 1] == 0) {
        n->len--;
    }
    return n;
}

static struct number *from_u64(uint64_t value) {
    struct number *n = number_new(2);
    n->limbs[0] = (uint32_t)value;
    n->limbs[1] = (uint32_t)(value >> 32);
    return trimmed(n);
}

static struct number *copy(const struct number *a) {
    struct number *n = number_new(a->len);
    memcpy(n->limbs, a->limbs, a->len * sizeof a->limbs[0]);
    return n;
}

static int compare(const struct number *a, const struct number *b) {
    if (a->len != b->len) {
        return a->len < b->len ? -1 : 1;
    }
    for (uint32_t i = a->len; i-- > 0;) {
        if (a->limbs[i] != b->limbs[i]) {
            return a->limbs[i] < b->limbs[i] ? -1 : 1;
        }
    }
    return 0;
}

static struct number *add(const struct number *a, const struct number *b) {
    if (a->len < b->len) {
        const struct number *swap = a;
        a = b;
        b = swap;
    }
    struct number *sum = number_new(a->len + 1);
    uint64_t carry = 0;
    for (uint32_t i = 0; i < a->len; i++) {
        carry += (uint64_t)a->limbs[i] + (i < b->len ? b->limbs[i] : 0);
        sum->limbs[i] = (uint32_t)carry;
        carry >>= 32;
    }
    sum->limbs[a->len] = (uint32_t)carry;
    return trimmed(sum);
}

/* |a - b| */
static struct number *distance(const struct number *a, const struct number *b) {
    if (compare(a, b) < 0) {
        const struct number *swap = a;
        a = b;
        b = swap;
    }
    struct number *difference = number_new(a->len);
    int64_t borrow = 0;
    for (uint32_t i = 0; i < a->len; i++) {
        borrow += (int64_t)a->limbs[i] - (i < b->len ? b->limbs[i] : 0);
        difference->limbs[i] = (uint32_t)borrow;
        borrow >>= 32;
    }
    return trimmed(difference);
}

static struct number *multiply(const struct number *a, const struct number *b) {
    struct number *product = number_new(a->len + b->len);
    memset(product->limbs, 0, product->len * sizeof product->limbs[0]);
    for (uint32_t i = 0; i < a->len; i++) {
        uint64_t carry = 0;
        for (uint32_t j = 0; j < b->len; j++) {
            carry += (uint64_t)a->limbs[i] * b->limbs[j] + product->limbs[i + j];
            product->limbs[i + j] = (uint32_t)carry;
            carry >>= 32;
        }
        product->limbs[i + b->len] = (uint32_t)carry;
    }
    return trimmed(product);
}

static struct number *shifted(const struct number *a, int bits) {
    struct number *n = number_new(a->len + 1);
    uint64_t carry = 0;
    for (uint32_t i = 0; i < a->len; i++) {
        carry |= (uint64_t)a->limbs[i] << bits;
        n->limbs[i] = (uint32_t)carry;
        carry >>= 32;
    }
    n->limbs[a->len] = (uint32_t)carry;
    return n;
}

/* a mod m, by long division (Knuth's algorithm D). */
static struct number *remainder_of(const struct number *a, const struct number *m) {
    if (compare(a, m) < 0) {
        return copy(a);
    }
    uint32_t n = m->len;
    if (n == 1) {
        uint64_t rest = 0;
        for (uint32_t i = a->len; i-- > 0;) {
            rest = (rest << 32 | a->limbs[i]) % m->limbs[0];
        }
        return from_u64(rest);
    }
    int shift = __builtin_clz(m->limbs[n - 1]);
    struct number *u = shifted(a, shift), *v = shifted(m, shift);
    for (uint32_t j = a->len - n + 1; j-- > 0;) {
        uint64_t head = (uint64_t)u->limbs[j + n] << 32 | u->limbs[j + n - 1];
        uint64_t quotient = head / v->limbs[n - 1], rest = head % v->limbs[n - 1];
        while (quotient >> 32 != 0 || quotient * v->limbs[n - 2] > (rest << 32 | u->limbs[j + n - 2])) {
            quotient--;
            rest += v->limbs[n - 1];
            if (rest >> 32 != 0) {
                break;
            }
        }
        int64_t borrow = 0;
        uint64_t carry = 0;
        for (uint32_t i = 0; i < n; i++) {
            carry += quotient * v->limbs[i];
            borrow += (int64_t)u->limbs[i + j] - (uint32_t)carry;
            u->limbs[i + j] = (uint32_t)borrow;
            borrow >>= 32;
            carry >>= 32;
        }
        borrow += (int64_t)u->limbs[j + n] - (int64_t)carry;
        u->limbs[j + n] = (uint32_t)borrow;
        if (borrow < 0) {
            carry = 0;
            for (uint32_t i = 0; i < n; i++) {
                carry += (uint64_t)u->limbs[i + j] + v->limbs[i];
                u->limbs[i + j] = (uint32_t)carry;
                carry >>= 32;
            }
            u->limbs[j + n] += (uint32_t)carry;
        }
    }
    struct number *rest = number_new(n);
    for (uint32_t i = 0; i < n; i++) {
        rest->limbs[i] = (uint32_t)(((uint64_t)u->limbs[i + 1] << 32 | u->limbs[i]) >> shift);
    }
    free(u);
    free(v);
    return trimmed(rest);
}

static struct number *multiply_mod(const struct number *a, const struct number *b, const struct number *m) {
    struct number *product = multiply(a, b);
    struct number *rest = remainder_of(product, m);
    free(product);
    return rest;
}

/* x -> x^2 + c mod m, consuming x. */
static struct number *step(struct number *x, const struct number *c, const struct number *m) {
    struct number *square = multiply(x, x);
    struct number *sum = add(square, c);
    struct number *rest = remainder_of(sum, m);
    free(x);
    free(square);
    free(sum);
    return rest;
}

static struct number *greatest_common_divisor(const struct number *a, const struct number *b) {
    struct number *x = copy(a), *y = copy(b);
    while (y->len > 0) {
        struct number *rest = remainder_of(x, y);
        free(x);
        x = y;
        y = rest;
    }
    free(y);
    return x;
}

/* A proper factor, or NULL when the sequence of this c closes without showing one. */
static struct number *find_factor(const struct number *m, uint64_t c_value) {
    enum { BATCH = 64 };
    struct number *c = from_u64(c_value), *one = from_u64(1);
    struct number *y = from_u64(2), *x = copy(y), *product = copy(one), *found = NULL;
    for (uint64_t run = 1; found == NULL; run *= 2) {
        free(x);
        x = copy(y);
        for (uint64_t done = 0; done < run && found == NULL; done += BATCH) {
            for (uint64_t i = 0; i < BATCH && i + done < run; i++) {
                y = step(y, c, m);
                struct number *gap = distance(x, y);
                struct number *next = multiply_mod(product, gap, m);
                free(gap);
                free(product);
                product = next;
            }
            struct number *divisor = greatest_common_divisor(product, m);
            if (compare(divisor, one) != 0) {
                found = divisor;
            } else {
                free(divisor);
            }
        }
    }
    free(c);
    free(one);
    free(x);
    free(y);
    free(product);
    if (compare(found, m) == 0) {
        free(found);
        return NULL;
    }
    return found;
}

int main(int argc, char **argv) {
    int times = argc > 1 ? atoi(argv[1]) : 1;
    struct number *p = from_u64(1000000000039u), *q = from_u64(1000000000061u);
    struct number *m = multiply(p, q);
    double start = seconds_now();
    for (int i = 0; i < times; i++) {
        struct number *factor = NULL;
        for (uint64_t c = 1; factor == NULL; c++) {
            factor = find_factor(m, c);
        }
        if (compare(factor, p) != 0 && compare(factor, q) != 0) {
            fail("found a number that is no factor");
        }
        free(factor);
    }
    result("seconds", seconds_now() - start);
    free(p);
    free(q);
    free(m);
    return 0;
}
